"""The configuration: YAML, presets, overrides."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alaya_hf import DIPR, AlayaCache, AlayaConfig, Flat, Full, Recovery, TopK, WindowConfig
from alaya_hf.errors import ConfigError

queries = st.one_of(
    st.just(Full()),
    st.builds(TopK, st.integers(0, 10_000)),
    st.builds(DIPR, alpha=st.floats(0, 1), cap=st.none() | st.integers(1, 1000)),
    st.builds(Recovery, st.floats(0.1, 1), cap=st.none() | st.integers(1, 1000)),
    st.builds(DIPR, beta=st.one_of(st.floats(0, 1e6), st.just(math.inf), st.integers(0, 100))),
)
windows = st.builds(WindowConfig, init=st.integers(0, 500), local=st.integers(1, 5000), overflow=st.integers(0, 500))
overrides = st.fixed_dictionaries(
    {},
    optional={
        "query": st.one_of(queries, st.sampled_from(["full", "topk", {"kind": "dipr", "beta": 3.5}])),
        "index": st.sampled_from(["flat", {"kind": "flat"}, Flat()]),
        "window": st.one_of(windows, st.sampled_from([(3, 4), {"local": 9}])),
        "group_mode": st.sampled_from(["union", "per_head"]),
        "max_sparse_queries": st.integers(1, 100),
    },
)
configs = st.builds(
    AlayaConfig,
    query=queries,
    window=windows,
    group_mode=st.sampled_from(["union", "per_head"]),
    dense_layers=st.lists(st.integers(0, 80), max_size=3),
    min_context=st.integers(0, 10_000),
    max_sparse_queries=st.integers(1, 1000),
    prefill_block=st.integers(1, 100_000),
    store_dtype=st.sampled_from(["auto", "float32", "float16", "bfloat16"]),
    layers=st.dictionaries(st.one_of(st.integers(0, 5), st.just("default")), overrides, max_size=3),
)


@given(configs)
def test_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, config: AlayaConfig) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    text = config.to_yaml(path)
    read = AlayaConfig.from_yaml(path)
    assert path.read_text(encoding="utf-8") == text
    for layer in range(7):
        assert read.for_layer(layer) == config.for_layer(layer)
    assert read.replace(layers={}) == config.replace(layers={})
    assert read.to_yaml() == text


@given(configs)
def test_dictionaries_round_trip(config: AlayaConfig) -> None:
    for full in (False, True):
        read = AlayaConfig.from_dict(config.to_dict(full=full))
        assert [read.for_layer(layer) for layer in range(7)] == [config.for_layer(layer) for layer in range(7)]
    assert set(config.to_dict(full=True)) == {field.name for field in dataclasses.fields(AlayaConfig)}


@given(configs, st.integers(0, 6))
def test_for_layer(config: AlayaConfig, layer: int) -> None:
    """The layer's own overrides win over the defaults of all layers, these over the configuration."""
    own = config.for_layer(layer)
    assert own.layers == {}
    expected = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for overrides in (config.layers.get("default", {}), config.layers.get(layer, {})):
        # A window given in part keeps the other fields of the window it changes.
        for name, value in overrides.items():
            partial = name == "window" and isinstance(value, dict)
            expected[name] = dataclasses.replace(WindowConfig.build(expected["window"]), **value) if partial else value
    expected["layers"] = {}
    assert own == AlayaConfig(**expected)


class TestPresets:
    @pytest.mark.parametrize("name", AlayaConfig.presets())
    def test_load(self, name: str) -> None:
        config = AlayaConfig.preset(name)
        assert AlayaConfig.from_dict(config.to_dict()) == config
        assert AlayaCache(name).settings == config

    def test_published_values(self) -> None:
        """What the papers say."""
        paper = AlayaConfig.preset("alayadb_paper")
        assert paper.query.range(128**-0.5) == pytest.approx(50, rel=0.01) and paper.query.cap is None
        alaya = AlayaConfig.preset("alaya")
        assert (alaya.window.init, alaya.window.local) == (128, 512)
        assert AlayaConfig.preset("topk").query == TopK(100)
        assert AlayaConfig.preset("full").query.keeps_all
        assert AlayaConfig.preset("streaming_llm").query.keeps_none

    def test_default_is_alaya(self) -> None:
        assert AlayaCache().settings == AlayaConfig.preset("alaya")

    def test_unknown(self) -> None:
        with pytest.raises(ConfigError, match="(?s)alya.*Available.*alaya.*full"):
            AlayaConfig.preset("alya")


class TestOverride:
    def test_paths(self) -> None:
        config = AlayaConfig().override({"query.beta": 50, "query.alpha": None, "window.local": 1024})
        assert config.query == DIPR(beta=50) and config.window == WindowConfig(local=1024)
        assert AlayaConfig().override({"group_mode": "per_head", "min_context": 7}).min_context == 7

    def test_beta_over_a_default_alpha(self) -> None:
        """Setting one of two parameters that exclude each other replaces the other."""
        assert AlayaConfig.preset("alaya").override({"query.beta": 50}).query == DIPR(beta=50, cap=128)
        assert AlayaConfig(query=DIPR(beta=5)).override({"query.alpha": 0.5}).query == DIPR(alpha=0.5)

    def test_another_kind_starts_from_its_defaults(self) -> None:
        assert AlayaConfig().override({"query": "topk"}).query == TopK(100)
        assert AlayaConfig().override({"query": "topk", "query.k": 7}).query == TopK(7)

    def test_layers(self) -> None:
        config = AlayaConfig().override(
            {"layers.0.index": "flat", "layers.2.query": "full", "layers.3.query.k": 4}
            | {"layers.3.query.kind": "topk"}
        )
        assert config.for_layer(2).query == Full() and config.for_layer(1).query == AlayaConfig().query
        assert config.for_layer(3).query == TopK(4)
        config = AlayaConfig().override({"layers.default.query": "full"})
        assert config.for_layer(11).query == Full()

    def test_keeps_the_original(self) -> None:
        config = AlayaConfig(layers={0: {"query": "full"}})
        config.override({"window.local": 3, "layers.0.query": "topk"})
        assert config.window.local == 512 and config.for_layer(0).query == Full()

    @pytest.mark.parametrize("path", ["querry.beta", "window.locl", "query.gamma", "nothing", "window.local.deep"])
    def test_unknown_paths(self, path: str) -> None:
        with pytest.raises(ConfigError) as caught:
            AlayaConfig().override({path: 1})
        assert path.split(".")[0] in str(caught.value) or path.split(".")[1] in str(caught.value)


class TestImmutability:
    @pytest.mark.parametrize("thing", [AlayaConfig(), WindowConfig(), DIPR(), TopK(), Flat()])
    def test_frozen(self, thing: Any) -> None:
        name = dataclasses.fields(thing)[0].name if dataclasses.fields(thing) else "anything"
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, 1)

    def test_replace_copies(self) -> None:
        config = AlayaConfig()
        assert config.replace(min_context=3).min_context == 3 and config.min_context == 2048

    def test_the_callers_mapping_is_copied(self) -> None:
        layers = {0: {"query": "full"}}
        config = AlayaConfig(layers=layers)
        layers[0]["query"] = "topk"
        layers[1] = {"query": "full"}
        assert config.for_layer(0).query == Full() and config.for_layer(1) == AlayaConfig()


class TestYaml:
    def test_empty_file_is_the_default(self, tmp_path: Path) -> None:
        (tmp_path / "empty.yaml").write_text("# nothing\n")
        assert AlayaConfig.from_yaml(tmp_path / "empty.yaml") == AlayaConfig()

    def test_errors_name_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "bad.yaml").write_text("windoww: [1, 2]\n")
        with pytest.raises(ConfigError, match="(?s)bad.yaml.*windoww.*window"):
            AlayaConfig.from_yaml(tmp_path / "bad.yaml")

    @pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "3\n"])
    def test_not_a_mapping(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match="mapping"):
            AlayaConfig.from_yaml(tmp_path / "bad.yaml")


def test_dipr_ranges() -> None:
    """beta is in units of scores: -ln(alpha) / scaling."""
    assert DIPR(alpha=0.5).range(0.25) == pytest.approx(math.log(2) * 4)
    assert DIPR(beta=3).range(0.25) == 3 and DIPR(alpha=1.0).range(0.1) == 0
    assert not DIPR(alpha=0, cap=3).keeps_all
    assert Recovery(1).keeps_all and not Recovery(1, cap=3).keeps_all
    assert DIPR(alpha=0).keeps_all and DIPR(beta=math.inf).keeps_all and not DIPR().keeps_all
