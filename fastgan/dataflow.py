"""What flows where in the forward of somebody else's module: read off as a torch.fx graph, with every child a
node, without running it on data.

A graph replaces a forward only if it does the same at every later call. So a forward is read only where its
source shows nothing that a trace would lose or freeze: no statement but assignments to names, branches, loops
and the return; calls of children, of torch functions and of methods of tensors; attributes of `self` that are
modules, tensors or plain values, which `facts` lists so that a later change is noticed. Everything else is
refused with the reason; nn.Sequential is known.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
import textwrap
import types
from typing import Any

from torch import Tensor, fx, nn

BUILTINS = {"len", "range", "enumerate", "zip", "reversed", "isinstance", "hasattr", "int", "float", "bool"}
PLAIN = (bool, int, float, str, type(None))
STATEMENTS = (
    *(ast.Assign, ast.AugAssign, ast.AnnAssign, ast.If, ast.For, ast.Return, ast.Expr),
    *(ast.Pass, ast.Break, ast.Continue, ast.Raise),
)
EXPRESSIONS = (ast.Await, ast.Yield, ast.YieldFrom, ast.Lambda, ast.NamedExpr)
PURE = {"torch", "torch.functional", "torch.nn.functional", "torch._C._nn", "torch.fft", "math"}
# of `a += b` and its kind, those that `_Proxy` knows
IN_PLACE = (ast.Add, ast.Sub, ast.Mult, ast.Div)
# functions and methods whose result a trace would take for a constant
DRAWN = ("rand", "normal", "bernoulli", "multinomial", "item", "tolist", "numpy")


class Unreadable(Exception):
    """Why a forward is not replaced by a graph."""


def read(module: nn.Module) -> fx.Graph:
    """The graph of `module.forward`, equal in training and evaluation mode.

    Raises:
        Unreadable: it cannot be read, or a graph would not do the same.
    """
    _check_source(module)
    training = [(m, m.training) for m in module.modules()]
    try:
        graphs = []
        for mode in (True, False):
            for m, _ in training:
                m.training = mode
            graphs.append(_Tracer().trace(module))
    except Unreadable:
        raise
    except Exception as error:  # whatever the forward raises when it meets a value it does not know
        message = str(error).partition("\n")[0] or type(error).__name__
        raise Unreadable(f"tracing its forward failed: {message}") from None
    finally:
        for m, mode in training:
            m.training = mode
    first, second = (str(graph.python_code("self").src) for graph in graphs)
    if first != second:
        raise Unreadable("its forward differs between training and evaluation mode")
    for node in graphs[0].nodes:
        # an annotation would have to be importable where the code of the graph is compiled
        node.type = None
    return graphs[0]


def facts(module: nn.Module) -> dict[str, object]:
    """The plain attributes that the forward of `module` reads, with their values."""
    if type(module).forward is nn.Sequential.forward:
        return {}
    tree = _source(module)
    me = tree.args.args[0].arg
    names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _is_name(n.value, me)}
    values = {name: getattr(module, name, None) for name in sorted(names - {"training"})}
    return {name: value for name, value in values.items() if isinstance(value, PLAIN)}


class _Proxy(fx.Proxy):
    """fx takes `a += b` for `a = a + b`; where somebody else reads a, that is not the same."""

    def _in_place(self, function: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            own = (*self.root.parameters(), *self.root.buffers())
            if not any(a is tensor for tensor in own):
                # fx would freeze it, as an attribute of the module
                raise Unreadable("its forward makes a tensor that does not depend on its input")
        return super().create_arg(a)


def _source(module: nn.Module) -> ast.FunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        raise Unreadable("the source of its forward is not available") from None
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        raise Unreadable("its forward is not a plain function")
    return tree


def _check_source(module: nn.Module) -> None:
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        raise Unreadable("its forward was replaced, or its __call__")
    if type(module).forward is not nn.Sequential.forward:
        _Reader(module, _source(module))


class _Reader(ast.NodeVisitor):
    """Visits the source of a forward; raises Unreadable at the first thing that a graph would not keep."""

    def __init__(self, module: nn.Module, tree: ast.FunctionDef) -> None:
        function = inspect.unwrap(type(module).forward)
        if not isinstance(function, types.FunctionType):
            raise Unreadable("its forward is not a plain function")
        if tree.args.vararg or tree.args.kwarg or tree.args.kwonlyargs or not tree.args.args:
            raise Unreadable("its forward takes *args or keyword-only arguments")
        self.module, self.me = module, tree.args.args[0].arg
        closure = inspect.getclosurevars(function)
        self.outside = {**vars(builtins), **closure.globals, **closure.nonlocals}
        stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.local = stored | {a.arg for a in (*tree.args.posonlyargs, *tree.args.args[1:])}
        for statement in tree.body:
            self.visit(statement)

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt) and not isinstance(node, STATEMENTS):
            raise Unreadable(f"its forward has a statement of kind {type(node).__name__}")
        if isinstance(node, EXPRESSIONS):
            raise Unreadable(f"its forward has an expression of kind {type(node).__name__}")
        super().visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Store):
            raise Unreadable(f"its forward stores an attribute, .{node.attr}")
        if _is_name(_root(node), self.me):
            value, owner = self.resolve(node), self.resolve(node.value)
            plain = owner is self.module and isinstance(value, PLAIN)
            if not plain and not isinstance(value, (nn.Module, Tensor)) and not isinstance(owner, Tensor):
                raise Unreadable(f"its forward reads {ast.unparse(node)}")
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.ctx, ast.Store):
            raise Unreadable("its forward stores an item")
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        # a value from outside may change between two calls
        value = self.resolve(node)
        if node.id not in self.local and not (callable(value) or isinstance(value, types.ModuleType)):
            raise Unreadable(f"its forward reads the global {node.id}")

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if not isinstance(node.op, IN_PLACE):
            raise Unreadable(f"its forward has an in-place {type(node.op).__name__}")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        text, root = ast.unparse(node.func), _root(node.func)
        refused = text.rsplit(".", 1)[-1].startswith(DRAWN)
        if isinstance(root, ast.Name) and root.id not in self.local:
            target = self.resolve(node.func)
            owner = self.resolve(node.func.value) if isinstance(node.func, ast.Attribute) else None
            known = isinstance(target, nn.Module) or isinstance(owner, Tensor) or text in BUILTINS
            # `if self.norm: x = self.norm(x)` where there is none: a fact, and tracing fails if it is called
            known |= target is None and owner is self.module
            refused |= not known and not _is_pure(target, owner)
        if refused or isinstance(root, (ast.IfExp, ast.BoolOp)):
            raise Unreadable(f"its forward calls {text}")
        self.generic_visit(node)

    def resolve(self, node: ast.expr) -> Any:
        """What an expression that is not local stands for, else None; an item of modules is a module."""
        if isinstance(node, ast.Name):
            return self.module if node.id == self.me else self.outside.get(node.id)
        if isinstance(node, ast.Attribute):
            return getattr(self.resolve(node.value), node.attr, None)
        owner = self.resolve(node.value) if isinstance(node, ast.Subscript) else None
        return owner if isinstance(owner, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) else None


def _root(node: ast.expr) -> ast.expr:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_pure(target: Any, owner: Any) -> bool:
    """A function of torch that only computes, by its own module or by the one that it was taken from."""
    homes = {getattr(target, "__module__", None), getattr(owner, "__name__", None)}
    return callable(target) and not isinstance(target, type) and bool(homes & PURE)
