"""Which query on which index, residual and engine, for every layer of a model: the policies behind ``AlayaConfig``'s targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from alaya_hf.config import AlayaConfig, WindowConfig
from alaya_hf.errors import BudgetError, ConfigError
from alaya_hf.planner.calibration import Calibration, load_calibration
from alaya_hf.planner.candidates import can_drive, candidates, engines, windows
from alaya_hf.planner.cost import cut_cap, layer_seconds, model_seconds
from alaya_hf.planner.layer_plan import Estimate, LayerPlan
from alaya_hf.planner.memory import device_bytes, host_bytes, workspace_bytes
from alaya_hf.planner.model_plan import ModelPlan, shared_key
from alaya_hf.planner.paper import paper_plan
from alaya_hf.planner.profile import Profile, expected, load_profile
from alaya_hf.planner.search import Choice, Limits, search
from alaya_hf.planner.shape import ModelShape
from alaya_hf.storage.memory import available_host_memory
from alaya_hf.units import bytes_text, time_text

#: Nats per token that plans stay below where nothing is asked for and memory and time allow it.
DEFAULT_KL = 1e-3
#: What a plan of the host engine has to gain over the dense one, at least, and however far off the estimates are.
_LEAST_GAIN, _MOST_GAIN = 0.05, 0.2


class Planner:
    """Plans for one model under one configuration.

    Parameters
    ----------
    settings : AlayaConfig
    shape : ModelShape
    calibration : Calibration, optional
        Costs; default: this machine's, else those that come with the package.
    profile : Profile, optional
        Qualities; default: the model's, else the one that comes with the package.
    """

    def __init__(
        self, settings: AlayaConfig, shape: ModelShape, calibration: Calibration | None = None, profile: Profile | None = None
    ) -> None:  # fmt: skip
        self.settings, self.shape = settings, shape
        self.calibration = load_calibration(shape) if calibration is None else calibration
        self.profile = load_profile(shape.name) if profile is None else profile
        self._alike: dict[tuple[object, ...], tuple[LayerPlan, ...]] = {}
        self._margins: dict[tuple[str, int | None], float] = {}

    @staticmethod
    def room_for(context: int) -> int:
        """Tokens that memory is counted for: the context and what is likely to be generated."""
        return context + max(1024, context // 16)

    def passes(self, engine: str) -> int:
        """Tokens of the longest pass that retrieves: one where a budget would have to hold the buffers of more on the device."""
        settings = self.settings
        tight = engine == "device" and settings.gpu_memory is not None and "max_sparse_queries" not in settings.given
        return 1 if tight else settings.max_sparse_queries

    # Estimates --------------------------------------------------------------------------------------------------------

    def estimate(
        self, plan: LayerPlan, layer: int, context: int, batch: int, room: int, correction: Mapping[str, float] | None = None,
        tokens: float | None = None,
    ) -> Estimate:  # fmt: skip
        """What a plan takes in a layer.

        Parameters
        ----------
        correction : mapping, optional
            Engine -> measured over estimated time.
        tokens : float, optional
            Measured over estimated tokens of this layer.
        """
        shape, profile = self.shape, self.profile
        window = plan.window.init + plan.window.local
        offloaded = 0.0 if context <= plan.min_context else max(0.0, context - window)
        groups = expected(plan, profile.layer(layer, shape.layers), context / profile.context, offloaded)
        factor = 1.0 if tokens is None or plan.query.keeps_all else tokens
        count = min(offloaded, factor * sum(tokens for tokens, _ in groups) / len(groups))
        mean = sum(share for _, share in groups) / len(groups)
        union = profile.union_of(shape.group) if plan.query.cut_again or shape.group > 1 else 1.0
        fetched = offloaded if plan.query.keeps_all else min(offloaded, count * union)
        given = (plan, shape, self.calibration, context, batch, fetched, correction)
        seconds = layer_seconds(*given)
        moved = 0.0 if plan.query.keeps_all and plan.engine == "device" else fetched * shape.token_bytes * batch
        return Estimate(
            tokens=count,
            fetched=fetched,
            recovery=min(share for _, share in groups),
            kl=0.0 if offloaded <= 0 else profile.kl(plan, mean) / shape.layers,
            seconds=seconds,
            tail=layer_seconds(*given, tail=True) if plan.engine == "device" else seconds,
            device_bytes=device_bytes(plan, shape, room, batch, self.passes(plan.engine)),
            host_bytes=host_bytes(plan, shape, room, batch),
            moved_bytes=moved,
        )

    def estimate_all(
        self, plans: Sequence[LayerPlan], context: int, batch: int, room: int | None = None, graphs: str | None = None,
        correction: Mapping[str, float] | None = None, tokens: Sequence[float] | None = None,
    ) -> ModelPlan:  # fmt: skip
        """What given plans take together; for other arguments see :meth:`estimate` and :meth:`plan`."""
        room = self.room_for(context) if room is None else room
        layers = tuple(
            (plan, self.estimate(plan, i, context, batch, room, correction, None if tokens is None else tokens[i]))
            for i, plan in enumerate(plans)
        )
        driven = {plan.engine for plan in plans} == {"device"}
        graphs = self.settings.cuda_graphs if graphs is None else graphs
        base = model_seconds(self.shape, self.calibration, "device" if driven else "host", graphs)
        base *= 1.0 if correction is None else correction.get("model", 1.0)
        passes = min(self.passes(engine) for engine in {plan.engine for plan in plans})
        sources = (
            f"costs: {self.calibration.hardware}"
            + (" (shipped; measure yours with `alaya-hf calibrate`)" if self.calibration.reference else ""),
            f"quality: {self.profile.model}, {self.profile.context} tokens"
            + (" (shipped; measure yours with `python -m eval profile MODEL`)" if self.profile.shipped else ""),
        )
        return ModelPlan(
            self.settings,
            self.shape,
            context,
            room,
            batch,
            graphs,
            layers,
            base,
            passes,
            (),
            sources,
        )

    # Policies ---------------------------------------------------------------------------------------------------------

    def plan(
        self, context: int, batch: int = 1, *, reused: int = 0, fixed: Sequence[LayerPlan] | None = None,
        correction: Mapping[str, float] | None = None, tokens: Sequence[float] | None = None, room: int | None = None,
    ) -> ModelPlan:  # fmt: skip
        """Plans of all layers.

        Parameters
        ----------
        context : int
            Tokens of the longest row.
        batch : int
        reused : int
            Tokens of a stored context that come first.
        fixed : sequence of LayerPlan, optional
            What already runs: engine, window, store and, on the device, the low-bit copy stay as they are.
        correction, tokens
            See :meth:`estimate`.
        room : int, optional
            Tokens to count memory for; default: :meth:`room_for`.

        Raises
        ------
        BudgetError
            If no plan fits into ``gpu_memory``.
        ConfigError
            If the settings given leave no plan.
        """
        room = self.room_for(context) if room is None else room
        if self.settings.planner == "paper":
            plans = [
                paper_plan(self.settings, self.shape.number(i), self.shape, context, batch, reused)
                for i in range(self.shape.layers)
            ]
            found = self.estimate_all(plans, context, batch, room, None, correction, tokens)
            budget = self.settings.gpu_bytes
            if budget is not None and found.device_bytes > budget:
                raise self._too_little(found.device_bytes, context, batch)
        else:
            found = self._by_cost(context, batch, room, fixed, correction, tokens)
        return found.with_warnings(*self._unmet(found))

    def _by_cost(
        self, context: int, batch: int, room: int, fixed: Sequence[LayerPlan] | None, correction: Mapping[str, float] | None,
        tokens: Sequence[float] | None,
    ) -> ModelPlan:  # fmt: skip
        best: tuple[tuple[float, ...], ModelPlan] | None = None
        smallest: int | None = None
        wanted = engines(self.settings, self.shape) if fixed is None else [fixed[0].engine]
        for engine in wanted:
            sizes = windows(self.settings) if fixed is None else [(fixed[0].window, fixed[0].min_context)]
            for window, whole in sizes:
                options: list[list[Choice]] = []
                alike: dict[int, list[Choice]] = {}
                # Layers without settings of their own differ in their profiles alone.
                free = fixed is None and tokens is None and not self.settings.layers and not self.settings.dense_layers
                for layer in range(self.shape.layers):
                    groups = id(self.profile.layer(layer, self.shape.layers))
                    if not free or groups not in alike:
                        alike[groups] = self._options(
                            layer, engine, window, whole, context, batch, room, fixed, correction, tokens
                        )
                    options.append(alike[groups])
                plan, needed = self._choose(options, engine, context, batch, room, correction, tokens)
                if plan is None:
                    smallest = needed if smallest is None else min(smallest, needed)
                    continue
                rank = self._rank(plan)
                if best is None or rank < best[0]:
                    best = rank, plan
                break
        if best is None:
            assert smallest is not None
            raise self._too_little(smallest, context, batch)
        return best[1]

    def _options(
        self, layer: int, engine: str, window: WindowConfig, whole: int, context: int, batch: int, room: int,
        fixed: Sequence[LayerPlan] | None, correction: Mapping[str, float] | None, tokens: Sequence[float] | None,
    ) -> list[Choice]:  # fmt: skip
        """Plans of a layer that keep the recovery asked for, or come closest to it, with estimates."""
        running, number = None if fixed is None else fixed[layer], self.shape.number(layer)
        drivers = [engine, "host"] if engine == "device" and running is None else [engine]
        found: list[Choice] = []
        for driver in drivers:
            if running is not None:
                driver = running.engine
            store = "auto" if running is None else running.store_dtype
            for plan in self._candidates(number, driver, window, whole, store):
                if running is not None:
                    if driver == "device" and (plan.index, plan.residual) != (running.index, running.residual):
                        continue
                    plan = replace(plan, window=running.window, min_context=running.min_context)
                factor = None if tokens is None else tokens[layer]
                found.append((plan, self.estimate(plan, layer, context, batch, room, correction, factor)))
            # A layer that the device cannot serve well enough is served by the host.
            if self.settings.recovery is None or any(e.recovery >= self.settings.recovery - 1e-9 for _, e in found):
                if found:
                    break
        if not found:
            own = self.settings.for_layer(number)
            fields = {"engine", "query", "index", "residual", "store_dtype", "dense_layers"}
            why = can_drive(self.shape) if engine == "device" else None
            raise ConfigError(
                f"layer {number}: nothing that the planner knows goes with the settings given, "
                f"{', '.join(sorted(own.given & fields)) or 'none of its own'} (engine {engine!r}{f': {why}' if why else ''}). "
                "Leave one of them to the planner."
            )
        found = self._worth_it(found)
        target = self.settings.recovery
        if target is None:
            return found
        kept = [choice for choice in found if choice[1].recovery >= target - 1e-9]
        most = max(estimate.recovery for _, estimate in found)
        return kept or [choice for choice in found if choice[1].recovery >= most - 1e-3]

    def _candidates(
        self, number: int, engine: str, window: WindowConfig, whole: int, store: str
    ) -> Sequence[LayerPlan]:
        """Those of a layer; layers without settings of their own have the same."""
        settings = self.settings
        own = (number,) if settings.layers or settings.dense_layers else ()
        key = (engine, window, whole, store, *own)
        if key not in self._alike:
            self._alike[key] = tuple(candidates(settings, number, self.shape, engine, window, whole, store))
        return self._alike[key]

    def _worth_it(self, found: list[Choice]) -> list[Choice]:
        """Without plans of the host engine that gain no more over the dense one than the estimates are off.

        The dense plan is exact and holds no more on the device: quality would be given away for a gain that may not be there.
        """
        dense = min((e.seconds for plan, e in found if plan.query.keeps_all and plan.engine == "host"), default=None)
        if dense is None:
            return found
        error = self.calibration.median_error
        worth = dense * (1 - min(_MOST_GAIN, max(_LEAST_GAIN, error if error is not None else 0.0)))
        return [c for c in found if c[0].query.keeps_all or c[0].engine != "host" or c[1].seconds < worth]

    def _choose(
        self, options: list[list[Choice]], engine: str, context: int, batch: int, room: int,
        correction: Mapping[str, float] | None, tokens: Sequence[float] | None,
    ) -> tuple[ModelPlan | None, int]:  # fmt: skip
        settings = self.settings
        driven = engine == "device" and all(layer[0][0].engine == "device" for layer in options)
        graphs = [settings.cuda_graphs]
        if driven and "cuda_graphs" not in settings.given and settings.slo is not None:
            graphs.append("compile")
        result: ModelPlan | None = None
        for how in graphs:
            base = model_seconds(self.shape, self.calibration, engine if driven else "host", how)
            base *= 1.0 if correction is None else correction.get("model", 1.0)
            slo = settings.slo_seconds
            limits = Limits(
                settings.gpu_bytes, None if slo is None else slo - base, DEFAULT_KL if settings.kl is None else settings.kl,
                settings.kl is not None,
            )  # fmt: skip
            chosen = self._search(options, limits, room, batch)
            if chosen is None:
                least = [min(layer, key=lambda choice: choice[1].device_bytes) for layer in options]
                shared = {
                    shared_key(plan): workspace_bytes(plan, self.shape, room, batch, self.passes(plan.engine))
                    for plan, _ in least
                }
                return None, sum(e.device_bytes for _, e in least) + sum(shared.values())
            plans = [plan.because(self._reason(plan, estimate)) for plan, estimate in chosen]
            found = self.estimate_all(plans, context, batch, room, how, correction, tokens)
            if result is None or self._rank(found) < self._rank(result):
                result = found
            if slo is None or found.tail <= slo:
                break
        return result, 0

    def _search(
        self, options: list[list[Choice]], limits: Limits, room: int, batch: int
    ) -> list[Choice] | None:  # fmt: skip
        """Plans within the limits; that of time is for the 95th percentile, with room for estimates as low as they tend to be."""

        def shared(plan: LayerPlan) -> int:
            return workspace_bytes(plan, self.shape, room, batch, self.passes(plan.engine))

        if limits.seconds is not None:
            options = [[(plan, replace(e, seconds=e.tail)) for plan, e in layer] for layer in options]
            sure = [
                [(plan, replace(e, seconds=e.seconds * self._margin(plan))) for plan, e in layer] for layer in options
            ]
            found = search(sure, replace(limits, firm=True), shared_key, shared)
            # Room to spare gives way to quality, time does not.
            if found is not None and sum(e.kl for _, e in found) <= limits.kl * (1 + 1e-9):
                if sum(e.seconds / self._margin(plan) for plan, e in found) <= limits.seconds:
                    return found
        return search(options, limits, shared_key, shared)

    def _margin(self, plan: LayerPlan) -> float:
        """What a plan's 95th percentile is taken for, times its estimate, where it has to stay within an SLO."""
        key = plan.engine, cut_cap(plan) if plan.engine == "device" else None
        if key not in self._margins:
            self._margins[key] = self.calibration.margin(*key)
        return self._margins[key]

    def _reason(self, plan: LayerPlan, estimate: Estimate) -> str:
        if plan.reason:
            return plan.reason
        settings = self.settings
        if plan.query.keeps_all:
            return "dense: a sparse step would cost as much"
        parts = []
        if settings.recovery is not None:
            parts.append(f"recovery {settings.recovery:g}")
        if settings.kl is not None:
            parts.append(f"KL {settings.kl:g}")
        if settings.slo is not None:
            parts.append("fewest bytes in time")
        elif settings.gpu_memory is not None:
            parts.append("fastest in memory")
        return ", ".join(parts) or "fastest"

    def _rank(self, plan: ModelPlan) -> tuple[float, ...]:
        """Promises first, then memory, then what is to be small."""
        settings = self.settings
        host = float(plan.host_bytes > 0.9 * available_host_memory()) if plan.shape.device == "cuda" else 0.0
        recovery = 0.0
        if settings.recovery is not None:
            recovery = sum(max(0.0, settings.recovery - estimate.recovery - 1e-9) for _, estimate in plan.layers)
        limit = DEFAULT_KL if settings.kl is None else settings.kl
        over_kl = max(0.0, plan.kl / limit - 1 - 1e-6)
        over_time = 0.0 if settings.slo_seconds is None else max(0.0, plan.tail / settings.slo_seconds - 1)
        quality = (over_kl, over_time) if settings.kl is not None else (over_time, over_kl)
        cost = plan.seconds if settings.slo is None else float(plan.device_bytes)
        return host, recovery, *quality, cost, plan.seconds

    # What cannot be kept ----------------------------------------------------------------------------------------------

    def _too_little(self, needed: int, context: int, batch: int) -> BudgetError:
        assert self.settings.gpu_bytes is not None
        return BudgetError(
            f"gpu_memory={self.settings.gpu_memory!r} is {bytes_text(self.settings.gpu_bytes)}, but the smallest plan for "
            f"{batch} x {context} tokens of {self.shape.layers} layers takes {bytes_text(needed)} on the device. Allow at least "
            f"{needed} bytes, give fewer settings of your own (window, engine, residual), or run fewer rows at a time."
        )

    def _unmet(self, plan: ModelPlan) -> list[str]:
        settings, found = self.settings, []
        slo = settings.slo_seconds
        if slo is not None and plan.tail > slo:
            found.append(
                f"slo={settings.slo!r} cannot be kept over {plan.batch} x {plan.context} tokens: the best plan takes about "
                f"{time_text(plan.tail)} per token, {time_text(plan.base_seconds)} of it outside attention. Allow that much, "
                "or relax recovery, kl or gpu_memory."
            )
        short = [
            i
            for i, (_, e) in enumerate(plan.layers)
            if settings.recovery is not None and e.recovery < settings.recovery - 1e-6
        ]
        if short:
            least = min(plan.layers[i][1].recovery for i in short)
            found.append(
                f"recovery={settings.recovery!r} cannot be kept in {len(short)} of {len(plan.layers)} layers with what is given: "
                f"the best there is {least:.3f}. Leave query or engine to the planner."
            )
        if settings.kl is not None and plan.kl > settings.kl * (1 + 1e-6):
            found.append(
                f"kl={settings.kl!r} cannot be kept with what is given: the best plan is expected to be {plan.kl:.2g} nats from "
                "full attention. Allow more gpu_memory or time, or leave more settings to the planner."
            )
        return found
