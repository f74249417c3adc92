"""Images: files of any bit depth and channel count, folders, embedded digits, augmentation, history pool."""

from fastgan.data.augment import from_tensor, to_tensor
from fastgan.data.dataset import Data, Split, open_data
from fastgan.data.digits import DigitSet, make_digits
from fastgan.data.feed import Loader, open_feed
from fastgan.data.images import DataError, list_images, read_images, write_image
from fastgan.data.pool import ImagePool
from fastgan.data.resident import Resident

__all__ = [
    "Data",
    "DataError",
    "DigitSet",
    "ImagePool",
    "Loader",
    "Resident",
    "Split",
    "from_tensor",
    "list_images",
    "make_digits",
    "open_data",
    "open_feed",
    "read_images",
    "to_tensor",
    "write_image",
]
