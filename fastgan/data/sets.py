"""The public data sets of the CycleGAN and pix2pix papers: where they are and what is known of their
archives.

Addresses: the download scripts of junyanz/pytorch-CycleGAN-and-pix2pix. Sizes and SHA-256 of the zip files:
the checksum list of TensorFlow Datasets (url_checksums/cycle_gan.txt); size of the facades pairs: what the
server announces in published download logs. None where no public source states them.
"""

from typing import Literal, NamedTuple

from fastgan.data.images import DataError

_ZIP = "https://efrosgans.eecs.berkeley.edu/cyclegan/datasets/{}.zip"
_TAR = "https://efrosgans.eecs.berkeley.edu/pix2pix/datasets/{}.tar.gz"
# whose images they are, as upstream's docs/datasets.md says: the archives carry no licence of their own
_WIKIART = "WikiArt, Flickr"
_FLICKR = "Flickr"
_IMAGENET = "ImageNet"
_CMP = "CMP Facades"
_GOOGLE = "Google Maps"
TERMS = "The archives carry no licence of their own: the terms of the images' origin apply."


class PublicSet(NamedTuple):
    """One archive: its address, what it shows, bytes and SHA-256 (None: not published), whose images."""

    url: str
    kind: Literal["unpaired", "paired", "photos"]
    about: str
    size: int | None
    sha256: str | None
    origin: str


def _unpaired(
    name: str, about: str, origin: str, size: int | None = None, sha256: str | None = None
) -> PublicSet:
    return PublicSet(_ZIP.format(name), "unpaired", about, size, sha256, origin)


def _paired(name: str, about: str, origin: str, size: int | None = None) -> PublicSet:
    return PublicSet(_TAR.format(name), "paired", about, size, None, origin)


PUBLIC_SETS = {
    "apple2orange": _unpaired(
        "apple2orange",
        "996 apples, 1,020 oranges",
        _IMAGENET,
        78456409,
        "845a191e9af8926408ea597001cd03a452e3300a1f44a79fe329b3d59f6e3eb8",
    ),
    "horse2zebra": _unpaired(
        "horse2zebra",
        "939 horses, 1,177 zebras",
        _IMAGENET,
        116867962,
        "a74d9d392eecca9966b51287a76ca126af473d9de4f3e8fc0e9cda08fa1730a1",
    ),
    "summer2winter_yosemite": _unpaired(
        "summer2winter_yosemite",
        "Yosemite: 1,273 in summer, 854 in winter",
        _FLICKR,
        132640856,
        "167fe1726807a9d22bd106b4a6c0bd7953b688af924ac1bf967439c4961e49f9",
    ),
    "monet2photo": _unpaired(
        "monet2photo",
        "1,074 Monets, 6,853 landscape photographs",
        _WIKIART,
        305231073,
        "88f91b00fc228f97c9411fbf1880ec1d119c98f1722e4cfcfaa2fb35fac05b04",
    ),
    "cezanne2photo": _unpaired(
        "cezanne2photo",
        "584 Cezannes, 6,853 landscape photographs",
        _WIKIART,
        279885071,
        "3a6c10ca21f9485862f1cbd707744b9dc258954a04631271d23a3605eeb63cff",
    ),
    "ukiyoe2photo": _unpaired(
        "ukiyoe2photo",
        "1,433 ukiyo-e prints, 6,853 landscape photographs",
        _WIKIART,
        292946532,
        "02a2a2fb5ecf425ca1bf86aca7304377da64a2a1d3b86df54eb65e4068bf3b08",
    ),
    "vangogh2photo": _unpaired(
        "vangogh2photo",
        "401 Van Goghs, 6,853 landscape photographs",
        _WIKIART,
        306590349,
        "362c3473e70be0944bda08d49d660eafdc2854df55d697835b8186d1d79caaff",
    ),
    "iphone2dslr_flower": _unpaired(
        "iphone2dslr_flower",
        "flowers: 1,813 by phones, 3,316 by cameras",
        _FLICKR,
        339964458,
        "8fcb5e374d631b107e1d961b8c4cd0a186aa2a4ff3e279923f4c426128de7113",
    ),
    "ae_photos": PublicSet(
        _ZIP.format("ae_photos"),
        "photos",
        "photographs to try painting styles on",
        None,
        None,
        "CycleGAN's authors",
    ),
    "maps-unpaired": _unpaired(
        "maps",
        "1,096 aerial photographs and maps",
        _GOOGLE,
        1476754427,
        "639534f69dbf9f36bef8d6292a7698006361221f83f0285d7c9ca78afe6e8a9e",
    ),
    "facades-unpaired": _unpaired(
        "facades",
        "400 facades and label maps",
        _CMP,
        35135868,
        "9a31ebf3a31b9b5cd195dd5bf62e9308e00cb94604d1019e3889ac84248695c0",
    ),
    "mini": _unpaired("mini", "a few images, to try things out", "CycleGAN's authors"),
    "facades-pairs": _paired(
        "facades", "400 facades and label maps; label to photo: --direction BtoA", _CMP, 30168306
    ),
    "maps-pairs": _paired("maps", "1,096 aerial photographs and maps, about 250 MB", _GOOGLE),
    "edges2shoes": _paired("edges2shoes", "50,000 shoes and their edges, about 2 GB", "UT Zappos50K"),
    "edges2handbags": _paired(
        "edges2handbags", "137,000 handbags and their edges, about 8 GB", "Amazon, iGAN"
    ),
    "night2day": _paired(
        "night2day", "17,823 views of outdoor scenes by night and day", "Transient Attributes"
    ),
    "mini_pix2pix": PublicSet(
        _ZIP.format("mini_pix2pix"),
        "paired",
        "a few pairs, to try things out",
        None,
        None,
        "CycleGAN's authors",
    ),
    "mini_colorization": PublicSet(
        _ZIP.format("mini_colorization"),
        "photos",
        "a few colour photographs",
        None,
        None,
        "CycleGAN's authors",
    ),
}

_CITYSCAPES = (
    "cityscapes may not be passed on: register at https://www.cityscapes-dataset.com, download "
    "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, unpack both and run: "
    "python -m fastgan.data pair "
    "gtFine leftImg8bit datasets/cityscapes --end-a _gtFine_color --end-b _leftImg8bit --size 256 256"
)


def find_set(name: str) -> PublicSet:
    """Return the set of this name; raises DataError, saying what to do, for cityscapes and unknown names."""
    if name in PUBLIC_SETS:
        return PUBLIC_SETS[name]
    if name == "cityscapes":
        raise DataError(_CITYSCAPES)
    near = [known for known in PUBLIC_SETS if known.startswith(name) or name.startswith(known)]
    hint = f"did you mean {' or '.join(near)}?" if near else "python -m fastgan.data list shows them"
    raise DataError(f"{name}: no public set of this name; {hint} (any other archive: --url URL)")
