"""YAML and overrides: what reads as what, what wins, and what one sentence a mistake gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import Config, UserError, load_config, load_run, to_yaml
from tests.tiny import TINY, tiny_config

pytestmark = pytest.mark.L0


def refusal(*overrides: str, path: Path = TINY) -> str:
    """The one line that loading gives."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("batch.clp=3", "unknown key batch.clp, did you mean batch.clip?"),
        ("optim.weight_decy=3", "unknown key optim.weight_decy, did you mean optim.weight_decay?"),
        ("lr=3", "unknown key lr, did you mean optim.lr?"),
        ("model.heads=3", "unknown key model.heads, did you mean model.text.heads?"),
        ("optm.lr=3", "unknown key optm, did you mean optim?"),
        ("model.trunk.hedas=3", "unknown key model.trunk.hedas, did you mean model.trunk.heads?"),
    ],
)
def test_an_unknown_key_names_its_nearest_neighbour(override: str, suggestion: str) -> None:
    assert suggestion in refusal(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generator.hads=5", "unknown key generator.hads, did you mean generator.heads?"),
        ("generator.heads=5", "generator: width=192 over heads=5"),
        ("generator.order=masked", "generator.order does not belong to generator.model=diffusion: remove it"),
        ("generator.model=autoregressive", "generator.time_scale does not belong to generator.model=autoregressive"),
        ("generator.model=gan", "generator.model='gan': input should be one of diffusion, autoregressive"),
    ],
)
def test_keys_of_a_section_of_several_kinds_are_as_one_writes_them(override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"generator_demo.yaml: {message}")):
        load_run(TINY.parents[1] / "configs" / "generator_demo.yaml", [override])


def test_a_key_like_nothing_gets_no_suggestion() -> None:
    assert refusal("zzz=1").endswith("unknown key zzz")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.clip=many", "batch.clip='many': input should be a valid integer"),
        ("batch.clip=12.5", "batch.clip=12.5: input should be a valid integer"),
        ("batch.clip=true", "batch.clip: true is not a number"),
        ("batch.clip=0", "batch.clip=0: input should be greater than or equal to 1"),
        ("optim.lr=-1e-3", "optim.lr=-0.001: input should be greater than 0"),
        ("optim.lr=nan", "optim.lr='nan': input should be a finite number"),
        ("views.flip=1.5", "views.flip=1.5: input should be less than or equal to 1"),
        ("model.trunk=3", "model.trunk=3: input should be a section of keys"),
        ("data.train=3", "data.train=3: input should be a list"),
        ("data.train=[3]", "data.train.0=3: input should be a valid string"),
        ("views.blur=[0.5]", "views.blur.1"),
        ("system.compile=maybe", "system.compile='maybe': input should be 'auto', 'on' or 'off'"),
        ("name=a/b", "name='a/b': string should match pattern"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_rule(override: str, message: str) -> None:
    assert message in refusal(override)


def test_all_mistakes_are_told_at_once() -> None:
    message = refusal("batch.clp=3", "optim.lr=fast")
    assert "unknown key batch.clp" in message
    assert "optim.lr='fast'" in message


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    message = refusal(path=written(tmp_path, "name: a\nbatch: {ssl: 1, rec: 1}\n"))
    assert "data is missing and has no default" in message
    assert "batch.clip is missing and has no default" in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'7'", "7"),
    ],
)
def test_a_word_that_yaml_takes_for_something_else_stays_a_word(text: str, value: str) -> None:
    assert tiny_config(f"system.run_dir={text}").system.run_dir == value


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("my data #1/x.tar", ("my data #1/x.tar",)),
        ("#1/x.tar", ("#1/x.tar",)),
        ("[a #1.tar, 'b #2.tar']", ("a #1.tar", "b #2.tar")),
        ("a.tar #", ("a.tar #",)),
    ],
)
def test_an_override_has_no_comments(text: str, paths: tuple[str, ...]) -> None:
    config = tiny_config(f"data.train={text}")
    assert config.data.train == paths
    assert "batch.clip='12 # rows': input should be a valid integer" in refusal("batch.clip=12 # rows")
    assert "\ue023" not in refusal("data.train=[a #1.tar") + to_yaml(config)


@pytest.mark.parametrize("text", ["*.tar", "{00..99}.tar", "{train,val}/*.tar", "*/{0..9}.tar", "%7B.tar", "@a/*.tar"])
def test_a_pattern_that_begins_with_a_sign_of_yaml_is_a_pattern(text: str) -> None:
    assert tiny_config(f"data.train={text}").data.train == (text,)
    assert tiny_config(f"data.train=[a.tar, '{text}']").data.train == ("a.tar", text)


@pytest.mark.parametrize("text", ["{clip: 12", "{clip: 12} {ssl: 3}", "[1, 2", '"a.tar', "'a.tar"])
def test_keys_lists_and_quotes_that_do_not_close_are_no_pattern(text: str) -> None:
    assert "is not a YAML value" in refusal(f"batch={text}")


def test_on_and_off_are_values_of_compile(tmp_path: Path) -> None:
    assert tiny_config("system.compile=on").system.compile == "on"
    text = TINY.read_text() + "system: {compile: off}\n"
    assert load_config(written(tmp_path, text)).system.compile == "off"


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1E-3", "1.e-3", ".1e-2", "+1e-3", "10e-4"])
def test_a_number_with_an_exponent_is_a_number(text: str) -> None:
    assert tiny_config(f"optim.lr={text}").optim.lr == 1e-3


def test_a_round_exponent_counts_steps() -> None:
    assert tiny_config("optim.steps=1e4").optim.steps == 10_000


def test_null_unsets() -> None:
    assert tiny_config("system.run_dir=a", "system.run_dir=null").system.run_dir is None


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "name: a\nbatch:\n  clip: 2\n  ssl: 2\n  clip: 4\n")
    assert refusal(path=path) == (f"--config {path}: line 5 gives clip a second time: a key has one value; remove one")


def test_a_merged_section_may_be_given_again(tmp_path: Path) -> None:
    text = TINY.read_text().replace("trunk: {", "trunk: &vit {")
    text = text.replace("decoder: {width: 32, depth: 1,", "decoder: {<<: *vit, depth: 1,")
    decoder = load_config(written(tmp_path, text)).model.decoder
    assert (decoder.width, decoder.depth) == (32, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [a", "is not valid YAML: line 1, column 9: "),
        (b"\xff\xfe", "is not valid YAML: 'utf-8' codec can't decode"),
        (b"a: !!python/object:os.system 1", "is not valid YAML: line 1, column 4: could not determine"),
        (b"- a", "holds a list, not keys and values"),
        (b"", "holds nothing, not keys and values"),
    ],
)
def test_an_unreadable_file_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert message in refusal(path=path)


def test_a_missing_file_names_the_presets(tmp_path: Path) -> None:
    message = refusal(path=tmp_path / "vtp_x.yaml")
    assert "cannot be read (No such file or directory)" in message
    presets = sorted(path.stem for path in (TINY.parent.parent / "configs").glob("*.yaml"))
    assert ", ".join(presets) in message
    assert "vtp_l" in presets


def test_an_override_beats_the_preset_and_the_last_one_wins() -> None:
    assert load_config(TINY).optim.steps == 6
    config = tiny_config("optim.steps=7", "optim={steps: 8}", "optim.steps=9")
    assert config.optim.steps == 9
    assert config.optim.precision == "bf16", "optim={...} replaced the whole section"
    assert config.teacher.momentum == 0.9, "the preset keeps what no override names"


def test_an_override_opens_a_section_the_preset_leaves_out(tmp_path: Path) -> None:
    assert tiny_config("system.loader.threads=3").system.loader.threads == 3
    path = written(tmp_path, TINY.read_text() + "system:\n")
    assert load_config(path, ["system.loader.threads=3"]).system.loader.threads == 3


def test_one_shard_pattern_needs_no_brackets() -> None:
    assert tiny_config("data.train=a/{00..09}.tar").data.train == ("a/{00..09}.tar",)
    assert tiny_config("data.train=[a.tar, b.tar]").data.train == ("a.tar", "b.tar")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "has no value: write key.sub=value"),
        ("=3", "has no value: write key.sub=value"),
        ("batch.clip.x=1", "clip holds 12, not keys"),
        ("data.train=[a", "is not a YAML value (line 1, column 3: "),
        ("batch={clip: 1, clip: 2}", "line 1 gives clip a second time"),
        ("system.run_dir=l\udcc3\udca4ufe", "is not readable in this process's encoding"),
    ],
)
def test_a_bad_override_is_quoted(override: str, message: str) -> None:
    found = refusal(override)
    assert found.startswith(f"override {override!r}")
    assert message in found


names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,7}", fullmatch=True)
texts = st.text(max_size=12)
shares = st.floats(0, 1)


@settings(deadline=None, max_examples=50)
@given(
    name=names,
    seed=st.integers(0, 2**63),
    train=st.lists(texts, max_size=3).map(tuple),
    run_dir=st.none() | texts.filter(lambda text: text and "\0" not in text),
    lr=st.floats(1e-300, 100),
    layer_scale=st.none() | st.floats(0, 100),
    blur=st.tuples(shares, shares, shares),
    compile=st.sampled_from(["auto", "on", "off"]),
    qk_norm=st.booleans(),
)
def test_what_is_written_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    seed: int,
    train: tuple[str, ...],
    run_dir: str | None,
    lr: float,
    layer_scale: float | None,
    blur: tuple[float, float, float],
    compile: str,
    qk_norm: bool,
) -> None:
    tree = tiny_config().model_dump()
    tree["name"], tree["seed"], tree["data"]["train"] = name, seed, train
    tree["system"].update(run_dir=run_dir, compile=compile)
    tree["optim"]["lr"], tree["views"]["blur"] = lr, blur
    tree["model"]["trunk"].update(qk_norm=qk_norm, layer_scale=layer_scale)
    config = Config.model_validate(tree)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize("name", ["1e5", "010", "on", "true", "null", "7", "1_000", "2024-01-01", "5.e1"])
def test_a_name_like_a_number_is_written_in_quotes(name: str, tmp_path: Path) -> None:
    config = tiny_config(f"name='{name}'")
    assert load_config(written(tmp_path, to_yaml(config))) == config


def test_the_written_config_spells_out_defaults() -> None:
    text = to_yaml(tiny_config())
    assert "weight_decay: 0.1" in text
    assert "compile: auto" in text
