"""Policies by name and by text, and how others find theirs."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kvprune
from kvprune import Adaptive, BudgetError, Chain, Eviction, KVPruneError, Policy, PolicyError, policies
from kvprune.cli import app
from kvprune.policies import (
    A2SF,
    FTP,
    H2O,
    KIVI,
    OSCAR,
    TOVA,
    AdaKV,
    Bits,
    CriticalAdaKV,
    CriticalKV,
    DropKV,
    ExpectedAttention,
    Full,
    KeyDiff,
    Keyformer,
    Knorm,
    KVCrush,
    KVzip,
    KVzipPlus,
    LazyLLM,
    Leverage,
    PyramidDrop,
    PyramidKV,
    Random,
    SnapKV,
    SpAtten,
    Spectral,
    StreamingLLM,
    TriAttention,
    TurboQuant,
    ZipCache,
    ZipVL,
)
from kvprune.policy import registry
from kvprune.policy.registry import from_description

BUILT_IN = {
    "a2sf": A2SF,
    "adakv": AdaKV,
    "critical_adakv": CriticalAdaKV,
    "criticalkv": CriticalKV,
    "dropkv": DropKV,
    "expected_attention": ExpectedAttention,
    "ftp": FTP,
    "full": Full,
    "h2o": H2O,
    "keydiff": KeyDiff,
    "keyformer": Keyformer,
    "kivi": KIVI,
    "knorm": Knorm,
    "kvcrush": KVCrush,
    "kvzip": KVzip,
    "lazyllm": LazyLLM,
    "leverage": Leverage,
    "kvzip_plus": KVzipPlus,
    "oscar": OSCAR,
    "pyramiddrop": PyramidDrop,
    "pyramidkv": PyramidKV,
    "random": Random,
    "snapkv": SnapKV,
    "spatten": SpAtten,
    "bits": Bits,
    "spectral": Spectral,
    "streaming_llm": StreamingLLM,
    "tova": TOVA,
    "tri_attention": TriAttention,
    "turboquant": TurboQuant,
    "zipcache": ZipCache,
    "zipvl": ZipVL,
}
each_policy = pytest.mark.parametrize("name", BUILT_IN)


# -- by name -----------------------------------------------------------------------------------------------------------


def test_brackets_hold_settings_of_what_is_inside_them():
    score = SnapKV(kernel_size=27, ahead=23, share=Adaptive(floor=0.3))
    text = "bits:score=snapkv(kernel_size=27,share=adaptive(floor=0.3),ahead=23),widths=(2,4),budget=0.05b"
    assert registry.parse(text) == Bits("0.05b", score=score, widths=(2, 4))
    assert registry.parse("bits(score=kvzip, widths=())") == Bits(score=KVzip(), widths=())
    assert registry.parse("kvzip()") == KVzip()
    assert registry.parse("lazyllm(schedule=((0.3,0.7),(0.6,0.5)))") == LazyLLM(((0.3, 0.7), (0.6, 0.5)))


def test_names_are_sorted_and_hold_what_is_built_in():
    """names() lists every policy once, in order; other packages may add theirs."""
    assert policies.names() == sorted(set(policies.names()))
    assert set(BUILT_IN) <= set(policies.names())


@each_policy
def test_find_gives_the_class(name):
    """find() gives the class that is imported under its own name, with a docstring and settings."""
    policy = policies.find(name)
    assert policy is BUILT_IN[name]
    assert issubclass(policy, Policy)
    assert policy.__doc__


@each_policy
def test_get_makes_the_policy(name):
    """get() makes a policy with its defaults, as the class does."""
    assert policies.get(name) == BUILT_IN[name]()


@pytest.mark.parametrize("name", ["A2SF", " a2sf ", "Streaming-LLM", "STREAMING_LLM", "SnapKV"])
def test_names_are_read_kindly(name):
    """Capitals, hyphens and spaces around a name do not matter."""
    assert policies.find(name) is BUILT_IN[name.strip().lower().replace("-", "_")]


def test_settings_reach_the_policy():
    """get() takes every setting of the policy."""
    made = policies.get("a2sf", budget=0.5, sinks=2, recent=0.25, forgetting_factor=0.9)
    assert made == A2SF(0.5, sinks=2, recent=0.25, forgetting_factor=0.9)
    assert policies.get("full") == Full()


@pytest.mark.parametrize(
    ("name", "meant"),
    [("a2fs", "a2sf"), ("h20", "h2o"), ("snap_kv", "snapkv"), ("streaming", "streaming_llm"), ("tovah", "tova")],
)
def test_unknown_names_are_answered_with_the_nearest(name, meant):
    """A name that is not known raises PolicyError with the nearest name and all others."""
    with pytest.raises(PolicyError, match=f"{name}.*Did you mean '{meant}'") as error:
        policies.get(name)
    assert all(known in str(error.value) for known in policies.names())


@pytest.mark.parametrize("name", ["", " ", "zzzzzz", "a2sf.b", "kvprune.policies:A2SF"])
def test_names_like_no_other(name):
    """A name that is near to none raises PolicyError with all names."""
    with pytest.raises(PolicyError, match=r"Known names: a2sf, .*tova") as error:
        policies.find(name)
    assert "Did you mean" not in str(error.value) or name == "a2sf.b"


@pytest.mark.parametrize(
    ("name", "setting"), [("a2sf", "gamma"), ("h2o", "forgetting_factor"), ("tova", "window"), ("full", "budget")]
)
def test_unknown_settings_are_answered_with_those_there_are(name, setting):
    """A setting that a policy lacks raises PolicyError with the settings it has."""
    with pytest.raises(PolicyError, match=f"{BUILT_IN[name].__name__} has no setting '{setting}'") as error:
        policies.get(name, **{setting: 1})
    known = [field.name for field in fields(BUILT_IN[name])]
    assert all(field in str(error.value) for field in known or ["none"])


def test_bad_settings_are_the_policys_own_errors():
    """get() raises what the class raises."""
    with pytest.raises(BudgetError):
        policies.get("a2sf", budget=0)
    with pytest.raises(PolicyError, match="kernel_size"):
        policies.get("h2o", kernel_size=4)


@pytest.mark.parametrize("name", [3, None, 0.5, b"a2sf", A2SF, A2SF()])
def test_names_are_text(name):
    """What is no string is no name, and no text to parse."""
    for use in (policies.find, policies.get, policies.parse):
        with pytest.raises(PolicyError, match="not"):
            use(name)


# -- by text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("a2sf", A2SF()),
        ("a2sf:budget=0.5", A2SF(0.5)),
        ("A2SF: budget = 64 , sinks=2", A2SF(64, sinks=2)),
        ("a2sf:budget=512MiB", A2SF("512MiB")),
        ("a2sf:budget=25%", A2SF("25%")),
        ("h2o:recent=0.25,group=max", H2O(recent=0.25, group="max")),
        ("snapkv:interval=none,pooling=avg", SnapKV(pooling="avg")),
        ("snapkv:interval=8", SnapKV(interval=8)),
        ("a2sf:forgetting_factor=1e-1", A2SF(forgetting_factor=0.1)),
        ("a2sf:budget=0.5 | streaming_llm:sinks=2", A2SF(0.5) | StreamingLLM(sinks=2)),
        ("h2o|tova|full", H2O() | TOVA() | Full()),
        ("keyformer:noise=0,tau_end=1", Keyformer(noise=0, tau_end=1)),
        ("keyformer:frozen_keys=true", Keyformer(frozen_keys=True)),
        ("keyformer:frozen_keys=False", Keyformer()),
        ("a2sf | zipcache:salient=0.4,high_bits=8", A2SF() | ZipCache(0.4, high_bits=8)),
        ("zipcache:normalizer=official,group_size=none", ZipCache(normalizer="official")),
        ("kivi:bits=4,residual=0", KIVI(4, residual=0)),
    ],
)
def test_text_is_read(text, policy):
    """A name with settings, or several with bars between, make the policy or the chain that they say."""
    assert policies.parse(text) == policy


@pytest.mark.parametrize(
    "text",
    [
        *("", "|", "a2sf|", "| a2sf", "a2sf || h2o", "nothing", "a2sf:", "a2sf:budget", "a2sf:budget=", "a2sf:=0.5"),
        *("a2sf:budget=0.5,", "a2sf:gamma=0.9", "a2sf:sinks=x", "a2sf:budget=x", "a2sf budget=0.5", "full:budget=1"),
        *("a2sf:budget=nan", "a2sf:recent=inf", "a2sf:kernel_size=2", "a2sf:budget=0.5;sinks=2", "a2sf:budget=0x10"),
        *("a2sf:sinks=true", "keyformer:frozen_keys=yes", "keyformer:frozen_keys=1", "kivi:bits=4.0", "kivi:bits=5"),
    ],
)
def test_text_that_cannot_be_read(text):
    """Any mistake in the text raises an error of kvprune."""
    with pytest.raises(KVPruneError):
        policies.parse(text)


@given(st.one_of(st.text(max_size=20), st.text("a2sf:|=,budget 01.", max_size=20)))
def test_any_text_is_read_or_refused(text):
    """Nothing but a policy or a KVPruneError comes of a text."""
    try:
        assert isinstance(policies.parse(text), Policy)
    except KVPruneError as error:
        assert str(error)  # noqa: PT017  either is fine


def test_defaults_go_where_they_fit():
    """Defaults reach every link that has such a setting and does not give it itself."""
    chain = policies.parse("a2sf:sinks=1 | full | h2o:budget=99", budget=0.5, sinks=3)
    assert chain == A2SF(0.5, sinks=1) | Full() | H2O(99, sinks=3)


@each_policy
def test_a_policy_prints_as_it_is_made(name):
    """str() shows the class, the first setting, and those that are not at their defaults."""
    assert str(policies.get(name)).startswith(BUILT_IN[name].__name__ + "(")
    if issubclass(BUILT_IN[name], Eviction):
        assert str(policies.get(name, budget=64, sinks=0, recent=1)).startswith(f"{BUILT_IN[name].__name__}(budget=64")


# -- chains ------------------------------------------------------------------------------------------------------------


def test_a_description_opens_no_file(tmp_path):
    description = {"policy": "kvzip", "settings": {"level": "head", "heads": str(tmp_path / "heads")}}
    for each in (description, [{"policy": "full", "settings": {}}, description | {"policy": "KVzip-plus"}]):
        with pytest.raises(PolicyError, match="names a file"):
            from_description(each)
    assert from_description(description | {"settings": {"level": "head", "heads": [[0.5]]}}).heads == ((0.5,),)


def test_chains_are_flat_and_in_order():
    """However a chain is bracketed, it is the same value."""
    first, second, third = A2SF(0.5), H2O(64), TOVA(8)
    assert (first | second) | third == first | (second | third) == Chain((first, second, third))
    assert first | second != second | first
    assert str(first | second) == "A2SF(budget=0.5) | H2O(budget=64)"


@pytest.mark.parametrize("other", ["h2o", 0.5, None, H2O])
def test_chains_hold_policies_only(other):
    """What is no policy cannot be a link."""
    with pytest.raises(TypeError):
        A2SF(0.5) | other
    with pytest.raises(TypeError):
        other | A2SF(0.5)


# -- policies of others ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Borrowed(Eviction):
    """A policy from somewhere else."""

    taste: float = 0.5


@dataclass(frozen=True)
class Choosy(Policy):
    """A setting without a default."""

    taste: float
    places: tuple[int, ...] = field(default_factory=lambda: (1, 2))


@pytest.fixture
def others(monkeypatch, tmp_path):
    """An environment in which another package has registered policies, some of them broken."""
    here = __name__
    points = {
        "borrowed": f"{here}:Borrowed",
        "My-Policy": f"{here}:Borrowed",
        "choosy": f"{here}:Choosy",
        "no_module": "no_such_module:Policy",
        "no_attribute": f"{here}:NoSuchPolicy",
        "no_policy": f"{here}:dataclass",
    }
    written = "".join(f"{name} = {value}\n" for name, value in points.items())
    folder = tmp_path / "others_policies-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: others-policies\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{written}")
    monkeypatch.syspath_prepend(tmp_path)
    registry._entry_points.cache_clear()
    yield
    registry._entry_points.cache_clear()


BROKEN = {
    "no_module": r"no_such_module:Policy, .*ModuleNotFoundError: .*no_such_module",
    "no_attribute": r"NoSuchPolicy, .*AttributeError: .*NoSuchPolicy",
    "no_policy": r"dataclass, .*no subclass of kvprune\.Policy",
}


@pytest.mark.usefixtures("others")
def test_policies_of_other_packages_are_found_by_entry_point():
    """What is registered under the group `kvprune.policies` has a name like those built in."""
    assert registry.GROUP == "kvprune.policies"
    assert "borrowed" in policies.names()
    assert policies.get("borrowed", budget=8, sinks=1, recent=2, taste=0.1) == Borrowed(8, sinks=1, recent=2, taste=0.1)
    with pytest.raises(PolicyError, match="Did you mean 'borrowed'"):
        policies.get("borowed")


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("name", ["my_policy", "My-Policy", "my-policy", "MY_POLICY"])
def test_names_of_other_packages_are_read_kindly_too(name):
    """An entry point with capitals and hyphens is listed and found under its normalized name."""
    assert "my_policy" in policies.names()
    assert policies.get(name) == Borrowed()


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_entry_points_are_named_with_their_package_and_the_cause(name):
    for use in (policies.find, policies.get, policies.parse):
        with pytest.raises(PolicyError, match=f"(?s)'{name}' .*package others-policies.*") as error:
            use(name)
        assert re.search(BROKEN[name], str(error.value))


@pytest.mark.usefixtures("others")
def test_broken_entry_points_do_not_disturb_others():
    """A policy that is not registered is described although the registry cannot be loaded as a whole."""
    assert registry.described(Unregistered(0.5)) == {"policy": f"{__name__}:Unregistered", "settings": {"taste": 0.5}}


@dataclass(frozen=True)
class Unregistered(Policy):
    """A policy that no entry point names."""

    taste: float


@pytest.mark.usefixtures("others")
def test_a_setting_without_a_default_must_be_given():
    assert policies.parse("choosy:taste=0.5") == policies.get("choosy", taste=0.5) == Choosy(0.5)
    for use in (policies.get, policies.parse):
        with pytest.raises(PolicyError, match="Choosy has no default for taste"):
            use("choosy")


@pytest.mark.usefixtures("others")
def test_the_command_line_lists_broken_entry_points_among_the_others():
    """`kvprune policies` shows every policy, and of a broken one what is wrong."""
    listed = CliRunner().invoke(app, ["policies", "--json"], catch_exceptions=False)
    entries = {entry["name"]: entry for entry in json.loads(listed.stdout)}
    assert list(entries) == policies.names()
    assert {name for name, entry in entries.items() if "error" in entry} == set(BROKEN)
    assert all(re.search(cause, entries[name]["error"]) for name, cause in BROKEN.items())
    assert entries["choosy"]["settings"] == {"places": [1, 2]}
    assert entries["choosy"]["required"] == ["taste"]
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["policies"], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "a2sf" in shown.output
    assert "taste (no default)" in shown.output
    assert "others-policies" in shown.output


def imported(path: Path, package: str) -> set[str]:
    """Dotted names of all that a module imports, anywhere in its code. package: that the module is in."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


ROOT = Path(kvprune.__file__).parents[1]
CORE = sorted((ROOT / "kvprune").rglob("*.py"))
POLICIES = sorted(Path(policies.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_imports_neither_policies_nor_integrations(path):
    """Integrations import policies and the core, policies import the core alone; not even lazily the other way."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert not [name for name in imported(path, package) if within(name, "policies", "integrations")]


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.name)
def test_policies_import_no_integration(path):
    assert not [name for name in imported(path, "kvprune.policies") if within(name, "integrations")]


def within(name: str, *packages: str) -> bool:
    return any(f"{name}.".startswith(f"kvprune.{package}.") for package in packages)


@pytest.mark.parametrize(
    "line",
    [
        *("import kvprune.policies", "import kvprune.policies.a2sf as a2sf", "from kvprune.policies import A2SF"),
        *("from kvprune import policies", "from kvprune.policies.a2sf import A2SF", "from .. import policies"),
        *("from ..policies import A2SF", "def f():\n    from kvprune.policies import A2SF"),
    ],
)
def test_every_kind_of_import_is_seen(tmp_path, line):
    """The test above would find a policy however it is imported."""
    (tmp_path / "module.py").write_text(line)
    assert any(within(name, "policies") for name in imported(tmp_path / "module.py", "kvprune.demo"))


@given(budget=st.one_of(st.integers(36, 10**6), st.integers(1, 100).map(lambda hundredths: hundredths / 100)))
def test_equal_settings_are_equal_policies(budget):
    """Policies are values: equal ones are the same key of a dictionary, and others are not."""
    assert {A2SF(budget): 1}[A2SF(budget)] == 1
    assert A2SF(budget) != H2O(budget)
    assert A2SF(budget) != A2SF(budget, sinks=1)
    assert hash(A2SF(budget)) == hash(A2SF(budget))
