"""From torch's `step()` to one rule on one tensor, whole or spread over ranks: what batchlab's optimizers share.

`foreach` forms take lists of tensors and must equal the rule; `fused=True` compiles it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from batchlab.core.c_library import compiler
from batchlab.core.checks import holds
from batchlab.core.errors import InputError
from batchlab.optim import on_cpu
from batchlab.optim.buckets import buckets
from batchlab.optim.leaf import Leaf, Steady, asks_for_state, is_flattened, leaf_of, name_at, names_of
from batchlab.optim.rule import Form, Numbers, Rule, alone, compiled, side_by_side, squares
from batchlab.optim.state_dtype import StateDtype, checked_state_dtype, in_dtype, state_like
from batchlab.parallel.shards import share
from batchlab.parallel.sums import Layout, sums_over

SMALL = 16384  # elements up to which a CPU takes a list of tensors faster than one by one


class RuleOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` around a rule.

    A subclass names its state (`STATE`, zeros like the parameter), its rule (`single`), if it has one the same for
    lists (`multi`), and gives their arguments. Half-precision parameters are updated in float32 and rounded once; their
    state is float32. Sums over a tensor are exact under FSDP2 and tensor parallelism: one collective a round.

    foreach: the form for lists; by default on GPUs, and on CPUs for tensors of up to 16,384 elements: for larger ones
    it is slower there than the plain loop. fused: compiles the rule at the first step (seconds; needs a C++ compiler)
    where tensors go one by one: the larger ones on CPUs; at once, kernels in C, where `on_cpu` has them. Lists are not
    compiled: on GPUs that took 15 s for 76 tensors, was no faster, and torch 2.11 compiled Lion's wrongly. Where a rule
    has a `kernel`, that is taken by default and for fused; foreach=False is the plain loop and foreach=True the form
    for lists, as they are written.
    state_dtype: see `batchlab.optim.state_dtype`. differentiable: refused if true.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    SQUARES: ClassVar[tuple[str, ...]] = ()  # of STATE: averages of squares, never negative
    LOW_BITS: ClassVar[bool] = True  # whether the rule allows a state in fewer than 32 bits
    OWN: ClassVar[tuple[str, ...]] = ()  # attributes of a subclass that a copy of the optimizer has too
    FLAT: ClassVar[bool] = True  # whether the rule is blind to a tensor's shape, but for being a matrix or more
    C_KERNELS: ClassVar[bool] = False  # whether `on_cpu` has the form for lists
    BY_ELEMENT: ClassVar[bool] = False  # whether the rule moves each element by its own past alone

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        state_dtype: StateDtype = None,
    ) -> None:
        if differentiable:
            raise InputError(f"{type(self).__name__} cannot be differentiated through: differentiable must be False")
        if foreach and fused:
            raise InputError("foreach and fused cannot both be True: fused compiles whichever form is the faster")
        self._watched = False
        self._noted: list[tuple[list[tuple[str | None, int, torch.Size]], dict[str, Tensor]]] = []
        self._compiled: dict[Form, Callable[..., Any]] = {}
        self._steady: dict[int, Steady] = {}  # of groups, by their first parameters' places
        self._kinds: dict[Any, int] = {}
        options = {"foreach": foreach, "fused": fused, "maximize": maximize, "state_dtype": state_dtype}
        super().__init__(params, defaults | options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; complex parameters and hyperparameters out of range are refused, by name."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            own = type(self).__name__
            if isinstance(lr := group.get("lr"), Tensor) and lr.ndim:
                shape = tuple(lr.shape)
                raise InputError(f"lr must be a number or a tensor without dimensions, got one of shape {shape}")
            group["state_dtype"] = checked_state_dtype(group["state_dtype"], own, allowed=self.LOW_BITS)
            self._settle_switches(group)
            self.check_group(group)
            first = sum(len(each["params"]) for each in self.param_groups[:-1])
            for name, parameter in zip(names_of(group, first), group["params"], strict=True):
                self.check_parameter(name, parameter, group)
            self._prepare(group)
        except BaseException:
            self.param_groups.pop()
            raise

    def _settle_switches(self, group: dict[str, Any]) -> None:
        """Makes truths Python's; refuses what would be taken as true because it is not empty, such as a text."""
        for name, kind in _switches(cast(Any, type(self))).items():
            value = group.get(name)
            if name not in group or (value is None and kind != "bool"):
                continue
            if not holds(lambda value: value == 0 or value == 1, value):
                right = "True or False" if kind == "bool" else "True, False or None"
                raise InputError(f"{name} must be {right}, got {value!r}")
            group[name] = bool(value)

    def _prepare(self, group: Mapping[str, Any]) -> None:
        if group["fused"] and self.C_KERNELS and compiler():
            on_cpu.prepare(group["params"])

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses hyperparameters of a group."""

    def check_parameter(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        """Refuses a parameter."""
        if not parameter.is_floating_point():
            raise InputError(
                f"{type(self).__name__} takes real parameters, got {name} of {parameter.dtype}: "
                "give complex ones to torch.optim.AdamW, or train torch.view_as_real of them"
            )
        if not self.BY_ELEMENT and is_flattened(parameter):
            raise InputError(
                f"{type(self).__name__} looks at whole tensors, and {name} is a piece of a flat buffer of "
                "FullyShardedDataParallel: shard with torch.distributed.fsdp.fully_shard (FSDP2)"
            )

    def forms(self, group: dict[str, Any]) -> tuple[Form, Form | None]:
        """The rule of a group's tensors, and its form for lists."""
        raise NotImplementedError

    def tensors(self, leaf: Leaf, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """The tensors that the rule takes of a leaf; by default all of `STATE` after weights and gradient."""
        return (leaf.w, leaf.g, *[leaf.state[name] for name in self.STATE])

    def numbers(self, leaf: Leaf, group: dict[str, Any]) -> Numbers:
        """The numbers that the rule takes, by name: the same for leaves alike in step, dtype, device and shape; of
        that the rules which are `FLAT` look at nothing but whether there is more than one dimension.
        """
        raise NotImplementedError

    def kernel(self, form: Form, tensors: Sequence[Any], numbers: Numbers, group: dict[str, Any]) -> Form | None:
        """What gives the same as a form by kernels of torch or of `on_gpu`, to be taken before it; None: there is none.

        tensors: as the form takes them, lists for the form for lists.
        """
        return None

    def new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter before its first step, spread as it is."""
        return {name: state_like(parameter, group["state_dtype"], squares=name in self.SQUARES) for name in self.STATE}

    def state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter, made where it has none."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            self.check_parameter(f"a parameter of shape {tuple(parameter.shape)}", parameter, group)
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")  # read at each step
            state.update(self.new_state(parameter, group))
        return state

    def gradient_of(self, parameter: Tensor) -> Tensor | None:
        """The gradient that a step takes; None leaves the parameter out of it."""
        return parameter.grad

    def before(self, leaves: Sequence[tuple[dict[str, Any], list[Leaf]]]) -> bool | None:
        """What is done to all leaves before any rule runs. False: no step is taken, nothing moves or counts."""
        return None

    def uncount(self, leaves: Sequence[tuple[dict[str, Any], list[Leaf]]]) -> None:
        """Takes back the count of a step that is not taken: for `before`, where it raises."""
        for leaf in [leaf for _, each in leaves for leaf in each]:
            self.state[leaf.parameter]["step"] -= 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients; returns the closure's loss.

        Where torch.distributed.checkpoint asks for the state of an optimizer that has none, it is made and no step
        taken: the run goes on as if nobody had asked.
        """
        asked, loss = closure is None and asks_for_state(self), None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._noted = []
        given = [self._given(group, first) for group, first in self._numbered()]  # refused before any step is counted
        self._steady = {each.first: self._steady[each.first] for each in given if each.first in self._steady}
        states = [[self.state_of(parameter, each.group) for parameter in each.parameters] for each in given]
        leaves: list[tuple[dict[str, Any], list[Leaf]]] = []
        try:
            leaves += [(each.group, self._leaves(each, held)) for each, held in zip(given, states, strict=True)]
            with _no_autocast({device.type for _, _, device, _ in self._kinds}):
                if self.before(leaves) is False or asked:
                    self.uncount(leaves)
                else:
                    self._update(leaves)
        finally:
            for leaf in [leaf for _, each in leaves for leaf in each]:
                leaf.rest()
        return loss

    def _update(self, leaves: Sequence[tuple[dict[str, Any], list[Leaf]]]) -> None:
        """Runs the rules of all leaves, rounds what is kept in other dtypes, and notes what is to be told."""
        kept = {id(leaf): leaf.w.clone() for _, each in leaves for leaf in each} if self._watched else {}
        loose: list[tuple[Rule, list[Leaf]]] = []
        for group, each in leaves:
            loose += self._run(group, each)
        for (_, each), found in zip(loose, side_by_side([rule for rule, _ in loose], _layouts(loose)), strict=True):
            self._note(each, found)
        for coarse, value in [pair for _, each in leaves for leaf in each for pair in leaf.rounded]:
            coarse.copy_(value)
        if self._watched:
            self._note_sizes([leaf for _, each in leaves for leaf in each], kept)

    def _numbered(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Each group, and the place of its first parameter among those of all groups."""
        first = 0
        for group in self.param_groups:
            yield group, first
            first += len(group["params"])

    def listed(self, leaf: Leaf, group: dict[str, Any]) -> bool:
        """Whether a tensor goes by the form for lists: as asked, else on GPUs, and on CPUs where it is small.

        There a call's own time counts and not the memory that lists take. The whole tensor's size decides, not that of
        this rank's part, nor what compiler this rank has: ranks that part ways would sum one tensor's squares with
        another's.
        """
        if self.forms(group)[1] is None:
            return False
        on_gpu = leaf.w.device.type == "cuda"
        if group["fused"] and self.C_KERNELS and leaf.w.is_cpu and (leaf.layout.mesh is not None or compiler()):
            return True
        if group["foreach"] is not None and not (group["fused"] and not on_gpu):
            return bool(group["foreach"])
        return on_gpu or (self.FLAT and leaf.shape.numel() <= SMALL)

    def at_once(self, leaf: Leaf, group: dict[str, Any]) -> int | None:
        """How many tensors alike to this one a list takes at most; None: all of them."""
        return None

    def _run(self, group: dict[str, Any], leaves: list[Leaf]) -> list[tuple[Rule, list[Leaf]]]:
        """Runs the rules of plain tensors; returns those that must run side by side, for they sum over ranks."""
        forms, as_it_is = self.forms(group), group["foreach"] is not None and not group["fused"]
        loose: list[tuple[Rule, list[Leaf]]] = []
        for bucket, tensors, numbers, listed in buckets(self, group, leaves):
            form = cast(Form, forms[listed])
            own = None if as_it_is else self.kernel(form, tensors, numbers, group)
            if bucket[0].layout.mesh is not None:
                rule = (own or form)(*tensors, **numbers)
                loose += [] if rule is None else [(rule, bucket)]
            elif group["fused"] and own is None and not listed:
                tensors = _flat(tensors) if self.FLAT else tensors
                self._note(bucket, self._compiled_form(form)(*tensors, **numbers))
            else:
                self._note(bucket, alone(own or form, *tensors, **numbers))
        return loose

    def _compiled_form(self, form: Form) -> Callable[..., Any]:
        if form not in self._compiled:
            self._compiled[form] = compiled(form)
        return self._compiled[form]

    def _given(self, group: dict[str, Any], first: int) -> _Given:
        parameters: Sequence[Tensor] = group["params"]
        given, places = [self.gradient_of(parameter) for parameter in parameters], list(range(len(parameters)))
        if type(None) in set(map(type, given)):
            places = [place for place in places if given[place] is not None]
            parameters, given = [parameters[place] for place in places], [given[place] for place in places]
        gradients = cast("list[Tensor]", given)
        for place in [place for place, each in zip(places, gradients, strict=True) if each.is_sparse]:
            raise InputError(
                f"{type(self).__name__} takes dense gradients, got a sparse one of {names_of(group, first)[place]}: "
                "build its embedding with sparse=False, or give it to torch.optim.SparseAdam"
            )
        return _Given(group, first, places, parameters, gradients)

    def _leaves(self, given: _Given, states: Sequence[dict[str, Any]]) -> list[Leaf]:
        group, first, places, parameters, gradients = given
        if states:
            torch._foreach_add_([state["step"] for state in states], _ONE, alpha=1.0)
        steady = self._steady.get(first)
        if steady is not None and steady.goes_on(parameters, gradients, states):
            steady.take(gradients, states, maximize=group["maximize"])
            return steady.leaves
        names = group.get("param_names") or [None] * len(group["params"])
        columns = ([names[place] for place in places], [first + place for place in places])
        each = zip(*columns, parameters, gradients, states, strict=True)
        leaves = [self._kept_kind(leaf_of(*one, maximize=group["maximize"])) for one in each]
        self._steady.pop(first, None)
        if Steady.fits(leaves, states):
            self._steady[first] = Steady(leaves, states)
        return leaves

    def _kept_kind(self, leaf: Leaf) -> Leaf:
        shape = (leaf.shape.numel() <= SMALL, len(leaf.shape) > 1) if self.FLAT else leaf.shape
        leaf.kind = self._kinds.setdefault((shape, leaf.w.dtype, leaf.w.device, leaf.layout), len(self._kinds))
        return leaf

    def _note(self, leaves: list[Leaf], found: dict[str, Tensor] | None) -> None:
        if found:
            self._noted.append(([(leaf.given_name, leaf.place, leaf.shape) for leaf in leaves], found))

    def _note_sizes(self, leaves: list[Leaf], kept: Mapping[int, Tensor]) -> None:
        now = [in_dtype(share(leaf.parameter.detach()).part, leaf.w.dtype) for leaf in leaves]  # rounded
        requests = [squares(kept[id(leaf)], w - kept[id(leaf)]) for leaf, w in zip(leaves, now, strict=True)]
        for leaf, (w_sq, moved_sq) in zip(leaves, sums_over(requests, [leaf.layout for leaf in leaves]), strict=True):
            self._note([leaf], {"weight_norm": w_sq.sqrt(), "update_ratio": (moved_sq / w_sq).sqrt()})

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it every step also notes |w| and |Δw|/|w| of each tensor, at the price of a copy of the weights."""
        before, self._watched, self._noted = self._watched, True, []
        try:
            yield
        finally:
            self._watched = before

    def report(self) -> dict[str, dict[str, float]]:
        """What the last step noted, by parameter: `trust_ratio` and the like; within `watching`, `update_ratio` too."""
        told: dict[str, dict[str, float]] = {}
        for named, found in self._noted:
            for what, values in found.items():
                for each, value in zip(named, values.reshape(-1).tolist(), strict=True):
                    told.setdefault(name_at(*each), {})[what] = value
        return told

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but that the state keeps the dtype it was saved in: torch would round it to the parameter's.

        Options that the saved groups lack, as those of torch.optim.AdamW do, are this optimizer's defaults.
        `InputError` where the saved state lacks what this optimizer keeps, as that of torch's SGD does, or is of other
        shapes, and for hyperparameters out of range: nothing is loaded then.
        """
        before = {name: self.__dict__[name] for name in ("state", "param_groups")}
        seen: list[dict[str, Any]] = []
        last = self.register_load_state_dict_pre_hook(lambda _, given: seen.append(given))
        first = self.register_load_state_dict_post_hook(lambda _: self._settle(seen[0]), prepend=True)
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.__dict__.update(before)
            raise
        finally:
            last.remove()
            first.remove()

    def _settle(self, loaded: Mapping[str, Any]) -> None:
        """What is done with a state that was loaded before anyone else sees it."""
        self._take_dtypes(loaded)
        for group, first in self._numbered():
            own = type(self).__name__
            group["state_dtype"] = checked_state_dtype(group["state_dtype"], own, allowed=self.LOW_BITS)
            self._check_state(group, first)
            self._settle_switches(group)
            self.check_group(group | _without_sign(group))
            self._prepare(group)

    def _check_state(self, group: dict[str, Any], first: int) -> None:
        for name, parameter in zip(names_of(group, first), group["params"], strict=True):
            state = self.state.get(parameter)
            if not state:
                continue
            own = self.new_state(parameter, group)
            if lacking := sorted({"step", *own} - state.keys()):
                raise InputError(
                    f"state_dict must be of {type(self).__name__}, but that of {name} holds {sorted(state)} and lacks "
                    f"{lacking}"
                )
            for what, value in own.items():
                if isinstance(value, Tensor) and (given := getattr(state[what], "shape", None)) != value.shape:
                    found = given if given is None else tuple(given)
                    raise InputError(
                        f"state_dict must be of these parameters, but {what} of {name} must have shape "
                        f"{tuple(value.shape)}, got {found}"
                    )

    def _take_dtypes(self, state_dict: Mapping[str, Any]) -> None:
        """Gives what was loaded the dtypes it was saved in."""
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        mine = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(saved, mine, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                held = self.state[parameter].get(name)
                if isinstance(value, Tensor) and isinstance(held, Tensor) and held.dtype != value.dtype:
                    self.state[parameter][name] = value.detach().clone().to(parameter.device)
            if parameter in self.state and isinstance(step := self.state[parameter].get("step"), Tensor):
                self.state[parameter]["step"] = step.cpu()  # torch puts that of a fused group on the device

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: self.__dict__[name] for name in self.OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in self.defaults.keys() - {"differentiable"}:
                group.setdefault(name, self.defaults[name])
        self._watched, self._noted, self._compiled = False, [], {}
        self._steady, self._kinds = {}, {}
        for group in self.param_groups:  # before anyone copies an 8-bit state again
            checked_state_dtype(group.get("state_dtype"), type(self).__name__, allowed=True)


def _without_sign(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group's rate for its check: schedulers that run on past their end leave it below 0."""
    lr = group.get("lr")
    return {} if lr is None or not holds(lambda lr: lr < 0, lr) else {"lr": -lr}


@cache
def _switches(kind: type) -> dict[str, str]:
    """The arguments of a class and its bases that are annotated as truths, "bool" or "bool | None", by name."""
    signatures = [inspect.signature(each.__init__) for each in kind.__mro__ if issubclass(each, RuleOptimizer)]
    given = [each for signature in signatures for each in signature.parameters.values()]
    return {each.name: each.annotation for each in given if each.annotation in ("bool", "bool | None")}


_ONE = torch.ones((), device="cpu")  # with alpha: a number would be made a tensor of for each step counter


def _layouts(loose: Sequence[tuple[Rule, list[Leaf]]]) -> list[Layout]:
    return [bucket[0].layout for _, bucket in loose]


def _flat(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """One dimension each, so that one compiled rule serves all shapes; as they are where memory order differs."""
    return [each.view(-1) for each in tensors] if all(each.is_contiguous() for each in tensors) else tensors


@contextmanager
def _no_autocast(devices: set[str]) -> Iterator[None]:
    """Within it no product is taken in half precision, though the step be called where autocast is on."""
    with ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _Given(NamedTuple):
    """What a step is given of a group. first: the place of its first parameter among those of all groups. places: of
    those that have a gradient, within the group.
    """

    group: dict[str, Any]
    first: int
    places: list[int]
    parameters: Sequence[Tensor]
    gradients: list[Tensor]
