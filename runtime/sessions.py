"""The sessions of a bundle: created when first needed, checked, shared by all generations."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

from dash_onnx.core.actions import ACTIONS, WIDE, Action, ActionPath, Form, LayerGroup
from dash_onnx.core.budget import scorer_facts
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.contract import (
    EMBED_PATH,
    DType,
    Port,
    Ports,
    embed_ports,
    head_path,
    head_ports,
    layer_path,
    scorer_ports,
)
from dash_onnx.core.errors import BundleError, DeviceError
from dash_onnx.core.forms import head_widens, widened_by
from dash_onnx.core.policy import Policy
from dash_onnx.runtime.backend import Backend
from dash_onnx.runtime.machine import available_bytes, release_memory, use_huge_pages
from dash_onnx.runtime.ort import thread_count

if TYPE_CHECKING:
    from dash_onnx.runtime.passes import Pass

Memory = Literal["high", "low"]
"""`high` also loads the wide form, which makes passes of many rows fast and takes about one more
byte per weight. With `low`, a mixture of experts that does not fit in memory runs from its files,
slowly."""


class LoadedGraph(NamedTuple):
    """A session, and the inputs and outputs that its graph has, of those of its kind."""

    session: Any
    ports: Ports


class PromptPlan(NamedTuple):
    """How a prompt runs.

    Attributes:
        path: action of each layer.
        head: precision of the LM head.
        widened: actions that may run wide in passes of many rows.
        groups: the layers, in runs that share an action for all tokens after the prompt.
    """

    path: ActionPath
    head: Action
    widened: frozenset[Action]
    groups: tuple[LayerGroup, ...]


_FROM_FILES = frozenset[Form](("int8", "int4"))  # of layers; `full` is cast to FP32, in memory
_LOG = logging.getLogger(__name__)
_MANY_BYTES = 64 << 20  # of weights: fewer stay in the caches

GroupForm: TypeAlias = tuple[range, Form]
"""A group of layers in one form, which may run as one graph."""


def _paths(layers: range, form: Form) -> set[str]:
    return {layer_path(layer, form) for layer in layers}


class Sessions:
    """One ORT session per graph, never two: ORT prepacks a copy of the weights for each session.

    Attributes:
        manifest: manifest of the bundle.
        widened: actions that may run in the wide form.
        backend: the device.
        bound: passes that have bound some of them to their buffers, by `id`.
    """

    def __init__(self, bundle: Bundle, backend: Backend, memory: Memory = "high"):
        """Loads nothing yet."""
        self.manifest = bundle.manifest
        self.widened = widened_by(self.manifest) if memory == "high" else frozenset[Action]()
        self.backend = backend
        self._low = memory == "low"
        self._mapped = frozenset[Form]()  # forms of layers whose weights stay in their files
        self._bundle = bundle
        self._loaded: dict[str, LoadedGraph] = {}
        self._joined: dict[GroupForm, LoadedGraph] = {}
        self._joining = threading.Lock()
        self._settled = frozenset[str]()
        self._locks: dict[str, threading.Lock] = {}  # held while a graph is loaded
        self._closed = False
        self.bound = WeakValueDictionary[int, "Pass"]()

    def embed(self) -> LoadedGraph:
        """The token embedding."""
        return self._get(EMBED_PATH, embed_ports(self.manifest.dims))

    def layer(self, layer: int, form: Form) -> LoadedGraph:
        """One layer in one form."""
        ports, packed = self.manifest.layer_ports(layer), form not in self._mapped
        return self._get(layer_path(layer, form), ports, packed=packed)

    def joined(self, layers: range, form: Form) -> LoadedGraph | None:
        """Consecutive layers as one graph; None where they have to run one by one.

        They run one by one where some of them are loaded alone or in another graph, as their
        weights would be in memory twice; in the wide form, whose passes have enough rows to hide
        the dispatch overhead; where their weights stay in files; and on devices where joining has
        not been measured.
        """
        with self._joining:
            loaded = self._joined.get((layers, form))
            if loaded is None and self._joins(layers, form):
                loaded = self._joined[layers, form] = self._join(layers, form)
                self._check_open()  # it may have been closed while this loaded
            return loaded

    def loads_again(self, layers: range, form: Form) -> bool:
        """Whether these layers are loaded as one graph, and some of them not also on their own."""
        return (layers, form) in self._joined and not _paths(layers, form) <= self._loaded.keys()

    def _joins(self, layers: range, form: Form) -> bool:
        """Whether layers that are not joined yet can be."""
        slow = form == WIDE or form in self._mapped
        possible = len(layers) > 1 and not slow and self.backend.joins
        return possible and self.loaded.isdisjoint(_paths(layers, form))

    def _join(self, layers: range, form: Form) -> LoadedGraph:
        from dash_onnx.runtime.compose import compose

        self._check_open()
        graph = compose(self._bundle, layers, form)
        session = self.backend.session(graph, weights=self._bundle.folder)
        ports = self.manifest.ports_joined(layers)
        name = f"layers {layers.start} to {layers.stop - 1} in {form}"
        return LoadedGraph(session, _ports_of(name, session, ports, "export again"))

    def head(self, form: Form) -> LoadedGraph:
        """Final norm and LM head."""
        return self._get(head_path(form), head_ports(self.manifest.dims))

    def has_wide_head(self) -> bool:
        """Whether the wide LM head is loaded."""
        return head_path(WIDE) in self._loaded

    def scorer(self) -> LoadedGraph:
        """The scorer; see `ScorerFacts`."""
        facts, manifest = scorer_facts(self.manifest), self.manifest
        ports = scorer_ports(manifest.dims, manifest.model.num_layers, len(facts.actions))
        return self._get(facts.file, ports, "train again (dash-train)", scorer=True)

    def preload(
        self,
        policy: Policy | None = None,
        prompt: PromptPlan | None = None,
        *,
        batches: bool = True,
    ) -> None:
        """Loads every graph of the bundle, or those that a policy and its prompts use.

        Args:
            policy: None loads every graph; the wide ones only with `memory="high"`.
            prompt: how its prompts run.
            batches: if False, the wide LM head loads with the first batch; drafts run without it.

        Raises:
            BundleError: a graph is damaged.
            DeviceError: they do not fit in memory.
        """
        heads, runs = self._used(policy, prompt)
        self.check_memory(policy, prompt)
        loads: list[Callable[[], Any]] = [
            *(partial(self.head, form) for form in heads if batches or form != WIDE),
            *(partial(self._load, *run) for run in runs),
            self.embed,
        ]
        if self.manifest.scorer is not None and (policy is None or policy.scored):
            loads.append(self.scorer)
        with ThreadPoolExecutor(thread_count()) as pool:
            list(pool.map(lambda load: load(), loads))

    def _load(self, layers: range, form: Form) -> None:
        if self.joined(layers, form) is None:
            for layer in layers:
                self.layer(layer, form)

    def bytes_to_load(self, policy: Policy, prompt: PromptPlan) -> int:
        """Bytes of weights that `preload` would load: layers and LM heads."""
        return self._bytes(*self._used(policy, prompt))

    def _used(
        self, policy: Policy | None, prompt: PromptPlan | None
    ) -> tuple[set[Form], list[GroupForm]]:
        """LM heads, and layers in each form that may run as one graph, as in `preload`."""
        manifest = self.manifest
        every = range(manifest.model.num_layers)
        heads: set[Form] = {*manifest.exported_heads}
        runs: set[GroupForm]
        runs = {(range(layer, layer + 1), form) for layer in every for form in manifest.actions}
        head_wide, wide = bool(self.widened), [bool(self.widened)] * len(every)
        if policy is not None and prompt is not None:
            heads = {policy.head, prompt.head}
            later = policy.used(len(every), manifest.actions)
            both = [*zip(prompt.path, later, strict=True)]
            runs = {(range(*one), prompt.path[one.start]) for one in prompt.groups}
            runs |= {
                (range(*one), form)
                for one in policy.groups(len(every))
                for form in later[one.start]
            }
            # Several tokens of a batch, or draft tokens, may run wide, whatever its prompts do.
            head_wide = head_widens(manifest.costs.passes, policy.head, self.widened)
            wide = [p in prompt.widened or bool(rest & self.widened) for p, rest in both]
        heads |= {WIDE} if head_wide else set()
        runs |= {(range(layer, layer + 1), WIDE) for layer in every if wide[layer]}
        return heads, sorted(runs, key=lambda run: (-len(run[0]), run[0].start))

    def _bytes(self, heads: Iterable[Form], runs: Iterable[GroupForm]) -> int:
        graphs = [(head_path(form), form) for form in heads]
        total = sum(self._held(*one) for one in graphs if one[0] not in self._loaded)
        for layers, form in runs:
            paths = _paths(layers, form)
            if (layers, form) in self._joined:
                continue
            if not self._joins(layers, form):
                paths -= self._loaded.keys()
            total += sum(self._held(path, form) for path in paths)
        return total

    def _held(self, path: str, form: Form) -> int:
        """Bytes of memory that the weights of a graph take."""
        mapped = form in self._mapped and path != head_path(form)
        return 0 if mapped else self.manifest.graph_bytes(path, form)

    def check_memory(self, policy: Policy | None, prompt: PromptPlan | None) -> None:
        """Refuses what `preload` would load if it does not fit beside what is loaded.

        Experts that can stay in their files do so.

        Raises:
            DeviceError: it does not fit.
        """
        if self.backend.device != "cpu" or (available := available_bytes()) is None:
            return
        heads, runs = self._used(policy, prompt)
        needed, experts = self._bytes(heads, runs), self.manifest.block.experts is not None
        if needed > available and experts and self._low:
            others = self._bytes(heads, [run for run in runs if run[1] not in _FROM_FILES])
            if others <= available:
                _LOG.warning(
                    "the layers need %.1f GB, and %.1f GB of memory are free: they are read from "
                    "their files, tens of times slower; --policy int8 slows less than int4",
                    (needed - others) / 1e9,
                    (available - others) / 1e9,
                )
                self._mapped, needed = _FROM_FILES, others
        if needed > available:
            slowly = ", or run the experts from their files, slowly (--memory low)"
            raise DeviceError(
                f"the graphs to load need {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB of "
                "memory are free: choose a policy that uses fewer (--policy int4), or close other "
                f"programs{slowly if experts and not self._low else ''}"
            )

    @property
    def loaded(self) -> frozenset[str]:
        """The graphs that are loaded, alone or joined, by their path in the bundle."""
        joined = [path for run in [*self._joined] for path in _paths(*run)]
        return frozenset([*self._loaded, *joined])

    @property
    def loaded_bytes(self) -> int:
        """Bytes of memory of the weights of layers and LM heads that are loaded."""
        graphs = [PurePosixPath(path) for path in [*self._loaded]]
        forms = [(str(path), path.stem) for path in graphs if path.stem in (*ACTIONS, WIDE)]
        forms += [(path, form) for layers, form in [*self._joined] for path in _paths(layers, form)]
        return sum(self._held(path, form) for path, form in forms)

    def forget(self) -> None:
        """Forgets every session, and frees its memory; each loads again when it is next needed."""
        with self.backend.lock:
            self._clear()
        release_memory()

    def close(self) -> None:
        """Forgets every session, for good, and frees its memory."""
        self._closed = True
        self.forget()

    def settle(self) -> None:
        """Moves what was loaded to huge pages in a separate thread: this takes up to a second."""
        with self._joining:
            loaded = self.loaded
            new = not loaded <= self._settled and self.loaded_bytes >= _MANY_BYTES
            self._settled = loaded
        if new and self.backend.device == "cpu":
            threading.Thread(target=use_huge_pages, name="huge pages", daemon=True).start()

    def _clear(self) -> None:
        for ref in self.bound.valuerefs():
            if (bound := ref()) is not None:
                bound.unbind()
        self._loaded.clear()
        self._joined.clear()

    def _check_open(self) -> None:
        if self._closed:
            self._clear()
            raise BundleError("this model is closed; load the bundle again")

    def _get(
        self,
        path: str,
        ports: Ports,
        remedy: str = "export again",
        **options: Any,
    ) -> LoadedGraph:
        loaded = self._loaded.get(path)
        if loaded is None:
            with self.backend.lock, self._locks.setdefault(path, threading.Lock()):
                loaded = self._loaded.get(path)
                self._check_open()
                if loaded is None:
                    session = self.backend.session(self._bundle.verified(path), **options)
                    loaded = LoadedGraph(session, _ports_of(path, session, ports, remedy))
                    self._loaded[path] = loaded
                    self._check_open()  # it may have been closed while this loaded
        return loaded


_TYPES: dict[DType, str] = {"float32": "float", "float16": "float16"}  # ORT's names for them


def _ports_of(path: str, session: Any, ports: Ports, remedy: str) -> Ports:
    """The ports that a graph has; refuses those that do not match the manifest's sizes."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    names = {port.name for port in inputs}
    present = Ports(tuple(port for port in ports.inputs if port.name in names), ports.outputs)
    for own, wanted in ((inputs, present.inputs), (outputs, present.outputs)):
        if [port.name for port in own] != [port.name for port in wanted] or not wanted:
            raise BundleError(f"{path} does not have the inputs and outputs of a bundle; {remedy}")
        for found, port in zip(own, wanted, strict=True):
            if not _fits(found, port):
                raise BundleError(
                    f"{path}: {port.name} is {found.type} {found.shape}, the manifest's sizes ask "
                    f"for {port.dtype} {[*port.shape]}; {remedy}"
                )
    return present


def _fits(found: Any, port: Port) -> bool:
    same_sizes = len(found.shape) == len(port.shape) and all(
        isinstance(size, str) or size == other
        for size, other in zip(port.shape, found.shape, strict=True)
    )
    return same_sizes and found.type == f"tensor({_TYPES.get(port.dtype, port.dtype)})"
