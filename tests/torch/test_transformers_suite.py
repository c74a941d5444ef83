"""Transformers' integration tests of PEFT, as suite_peft_integration.py has them, offline on stand-ins of the Hub's
repositories: with Transformers and PEFT as they are, which shows that the stand-ins are right, and with peftc put under
Transformers.  Every test of the suite is a test here, once for each stack.

TRANSFORMERS_TESTS=tests/peft_integration/test_peft_integration.py (the file of a checkout of Transformers; it needs the
package datasets, too) runs that file itself, with peftc."""

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from importlib.metadata import version
from pathlib import Path

import pytest
import standin_hub

for package in ("transformers", "peft"):
    pytest.importorskip(package)

HERE = Path(__file__).parent
SUITE = HERE / "suite_peft_integration.py"
V5 = int(version("transformers").split(".")[0]) >= 5

# What the reference cannot do; page "differences" in the docs.  Strict: what is repaired there is to be taken out here.
KNOWN = (
    {
        f"test_hotswap_{how}_compile_and_{rank}_rank_works": "enable_peft_hotswap has no effect: ranks differ"
        for how, rank in (("without", "with_lower"), ("without", "with_higher"))
    }
    if V5
    else {"test_peft_from_pretrained_hub_kwargs": "a subfolder is not found offline"}
)
SLOW_IN_REFERENCE = "with_compile"  # half a minute of compilers that says nothing about the stand-ins


def names_of(file):
    return [node.name for node in ast.parse(file.read_text()).body if getattr(node, "name", "").startswith("test_")]


def run(stack, home, report, *arguments):
    """Run pytest on what `arguments` name; returns test → [(outcome, text)], a pair for each set of parameters."""
    environment = standin_hub.environment(home)
    environment["SUITE_STACK"] = stack
    environment["RUN_SLOW"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), environment["PYTHONPATH"]])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "suite_stack",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    if not report.exists():
        pytest.fail(f"the suite did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    results = {}
    for case in xml.parse(report).iter("testcase"):
        outcome = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        text = "" if outcome is None else f"{outcome.get('message', '')}\n{outcome.text or ''}"
        pair = ("passed" if outcome is None else outcome.tag, text)
        results.setdefault(case.get("name").partition("[")[0], []).append(pair)
    if not results:
        pytest.fail(f"the suite has no tests:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return results


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return standin_hub.make(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session")
def reference(home, tmp_path_factory):
    report = tmp_path_factory.mktemp("reference") / "report.xml"
    return run("reference", home, report, "-k", f"not {SLOW_IN_REFERENCE}", str(SUITE))


@pytest.fixture(scope="session")
def patched(home, tmp_path_factory):
    return run("peftc", home, tmp_path_factory.mktemp("patched") / "report.xml", str(SUITE))


def judge(results, test):
    bad = [text for outcome, text in results[test] if outcome in ("failure", "error")]
    if bad:
        pytest.fail("\n\n".join(bad), pytrace=False)
    if all(outcome == "skipped" for outcome, _ in results[test]):
        pytest.skip(results[test][0][1].strip().splitlines()[0])


@pytest.mark.parametrize("test", [test for test in names_of(SUITE) if SLOW_IN_REFERENCE not in test])
def test_reference(reference, test):
    if test in KNOWN:
        assert any(outcome == "failure" for outcome, _ in reference[test]), f"repaired in the reference: {KNOWN[test]}"
    else:
        judge(reference, test)


@pytest.mark.parametrize("test", names_of(SUITE))
def test_peftc(patched, test):
    judge(patched, test)


@pytest.mark.skipif("TRANSFORMERS_TESTS" not in os.environ, reason="TRANSFORMERS_TESTS does not name their file")
def test_their_own_file(home, tmp_path):
    pytest.importorskip("datasets")
    results = run("peftc", home, tmp_path / "report.xml", os.environ["TRANSFORMERS_TESTS"])
    bad = {test: text for test, pairs in results.items() for outcome, text in pairs if outcome in ("failure", "error")}
    assert not bad, "\n\n".join(f"{test}\n{text}" for test, text in bad.items())
