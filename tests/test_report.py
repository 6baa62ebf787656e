"""The report of tiny runs: what it says, what it leaves out, that it loads nothing."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from cli_run import fit, run
from models import plan_of

from lmerge.history import read_series
from lmerge.report import write_report
from lmerge.report_run import read_record, unique_names
from lmerge.report_table import sentence, subject_changes
from lmerge.runs import write_plan

LOADING = {"src", "srcset", "poster", "data", "action", "background", "ping"}
"""Attributes that make a browser fetch something; `href` does so on some elements alone."""


class Page(HTMLParser):
    """What a page refers to, its text, and the elements with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements if name in attrs]


@pytest.fixture(scope="module")
def run_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the tiny model, with its report."""
    folder = tmp_path_factory.mktemp("report") / "tiny"
    fit(tiny_dir, folder, "--data.domains=[medical,legal]", "--artefacts.report=true")
    return folder


@pytest.fixture
def copied(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change, without its page."""
    folder = Path(shutil.copytree(run_dir, tmp_path / "run"))
    (folder / "report.html").unlink()
    return folder


def page(*runs: Path, **options: Path) -> str:
    path = runs[0] / "page.html"
    write_report(runs, path, **options)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(run_dir: Path) -> str:
    """The page of the run as it is."""
    return page(run_dir)


def sections(html: str) -> set[str]:
    return {str(a["id"]) for tag, a in Page(html).elements if tag == "section" and "id" in a}


def test_every_fit_ends_with_a_report_of_all_sections(run_dir: Path) -> None:
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert sections(html) == {
        "cost", "plan", "similarity", "alignment", "training", "subjects", "texts", "reproduce",
    }  # fmt: skip
    assert len(html) < 3e6


def test_a_page_loads_nothing(html: str) -> None:
    found = Page(html)
    used = {name for _, attrs in found.elements for name in attrs}
    assert not used & LOADING
    assert all(value.startswith(("#", "data:")) for value in found.values("href"))
    assert "default-src 'none'" in html
    assert not re.search(r"@import|url\((?!#)|https?://", html)


def test_ids_of_a_page_are_unique_and_its_links_have_targets(html: str) -> None:
    found = Page(html)
    ids = found.values("id")
    assert len(set(ids)) == len(ids)
    assert {v[1:] for v in found.values("href") if v.startswith("#")} <= set(ids)


def test_what_models_write_is_escaped(copied: Path) -> None:
    path = copied / "metrics.json"
    evil = '<script>alert("x")</script>&amp;'
    data = json.loads(path.read_text())
    prompt = next(iter(data["validate"]["generation"]["merged"]["texts"]))
    data["validate"]["generation"]["merged"]["texts"][prompt] = evil
    data["validate"]["questions"][0]["subject"] = "<b>subject</b>"
    path.write_text(json.dumps(data))
    config = copied / "config.yaml"
    config.write_text(config.read_text() + "# </pre><script>config</script>\n")
    html = page(copied)
    assert evil not in html
    assert evil in Page(html).text
    assert "<b>subject" not in html
    assert "<script>config" not in html


def test_the_table_holds_cost_intervals_and_gate(run_dir: Path, html: str) -> None:
    text = Page(html).text
    results = json.loads((run_dir / "metrics.json").read_text())["validate"]
    for model in ("source", "merged"):
        assert f"{results['text']['en'][model]['loss']:.3f}" in text
    assert f"{results['text']['en']['merged']['kl']:.3f}" in text
    assert "prefill (tokens/s)" in text
    assert "perplexity ratio on en text" in text


def test_the_sentence_says_what_was_removed_and_what_it_cost(run_dir: Path, html: str) -> None:
    record = read_record(run_dir, "tiny")
    said = sentence(record, record.stages["validate"])
    both = record.stages["validate"]["text"]["en"]
    assert said.startswith("2 of the 4 layers of ")
    assert f"from {both['source']['loss']:.3f} to {both['merged']['loss']:.3f}" in said
    assert said in Page(html).text


def test_differences_by_subject_are_those_of_the_accuracies(run_dir: Path) -> None:
    results = read_record(run_dir, "tiny").stages["validate"]
    both = results["choices"]["cloze"]
    for change in subject_changes(results, "cloze")[1:]:
        subject = change.name.rpartition(" (")[0]
        before, after = (both[m]["by_subject"][subject]["accuracy"] for m in ("source", "merged"))
        assert change.value == pytest.approx(100 * (after - before))
        assert not change.low > change.value > change.high


@pytest.mark.parametrize(
    ("gone", "section", "command"),
    [
        ("metrics.json", "cost", "lmerge validate"),
        ("similarity", "similarity", "lmerge similarity"),
        ("alignment", "alignment", "--alignment.method weights"),
        ("logs", "training", "--trainer.max_steps"),
    ],
)
def test_a_section_without_data_is_left_out_with_the_command_that_makes_it(
    gone: str, section: str, command: str, copied: Path
) -> None:
    path = copied / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    html = page(copied)
    assert section not in sections(html)
    assert command in Page(html).text.partition("Not in this report")[2]


def test_a_failed_gate_is_said_at_the_top(copied: Path) -> None:
    path = copied / "metrics.json"
    data = json.loads(path.read_text())
    data["validate"]["gate"][0]["passed"] = False
    path.write_text(json.dumps(data))
    head = Page(page(copied)).text.partition("What it cost")[0]
    assert f"failed its gate: {data['validate']['gate'][0]['name']}" in head


def test_a_plan_that_merges_nothing_has_a_report(tmp_path: Path) -> None:
    write_plan(tmp_path, plan_of())
    assert "0 of the 4 layers" in Page(page(tmp_path)).text


def test_a_plan_alone_is_enough_for_a_report(copied: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(copied / "plan.json", bare)
    assert "has not been measured" in Page(page(bare)).text


def test_alphas_are_logged_from_their_start_on(run_dir: Path) -> None:
    series = read_series(run_dir)
    anchor = read_record(run_dir, "tiny").plan.groups[0].anchor
    points = series[f"alpha/mean/{anchor}"]
    assert points[0] == (0, 1.0)
    assert [step for step, _ in points] == [0, 1, 2, 3]


def test_several_runs_stand_side_by_side_with_paired_tests(
    run_dir: Path, copied: Path, html: str
) -> None:
    alone, html = html, page(run_dir, copied)
    assert html.count('class="heatmap"') == alone.count('class="heatmap"')  # equal ones once
    assert "pairs" in sections(html)
    heads = [a["class"] for tag, a in Page(html).elements if tag == "th" and "class" in a]
    assert heads.count("run") == 2
    assert "2 runs side by side" in Page(html).text
    assert "different data" not in html
    assert "Not the same" not in html


def test_runs_on_different_data_keep_their_own_source_column(run_dir: Path, copied: Path) -> None:
    path = copied / "metrics.json"
    data = json.loads(path.read_text())
    data["validate"]["fingerprints"]["val"] = "another"
    path.write_text(json.dumps(data))
    html = page(run_dir, copied)
    assert "different data" in html
    assert "Not comparable" in html


def test_heatmaps_of_runs_with_other_plans_have_a_switch(run_dir: Path, copied: Path) -> None:
    (copied / "alphas.json").unlink()
    plan = json.loads((copied / "plan.json").read_text())
    plan["groups"] = [{"members": [0, 1], "anchor": 0}]
    (copied / "plan.json").write_text(json.dumps(plan))
    found = Page(page(run_dir, copied))
    names = [a["name"] for tag, a in found.elements if tag == "select"]
    assert names == ["run", "domain", "language"]
    assert all(f"angular: medical/en ({run})" in found.text for run in (run_dir.name, copied.name))


def test_a_study_adds_its_matrices_by_domain_and_language(
    run_dir: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    run("similarity", f"--source={tiny_dir}", f"--out_dir={study}", "--domains=[medical]",
        "--languages=[en,es]", "--measures=[cka,cosine]", "--num_bootstrap=0",
        "--num_prompts=4")  # fmt: skip
    found = Page(page(run_dir, similarity=study))
    names = [a["name"] for tag, a in found.elements if tag == "select"]
    assert names == ["measure", "domain", "language"]
    shown = {(a["data-measure"], a["data-language"]) for _, a in found.elements if "data-run" in a}
    assert shown >= {("cka", "en"), ("cka", "es"), ("cosine", "es")}


def test_the_command_takes_several_runs_in_a_row(
    run_dir: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("report", run_dir, copied)
    assert (tmp_path / "report.html").is_file()
    run("report", copied, "--stage", "validate")
    assert (copied / "report.html").is_file()


def test_a_folder_that_is_no_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("report", tmp_path)
    assert "holds no plan.json" in capsys.readouterr().err


def test_a_damaged_matrix_is_refused_in_one_line(copied: Path) -> None:
    (copied / "similarity" / "all.npy").write_text("no matrix")
    with pytest.raises(ValueError, match=r"all\.npy must be a matrix"):
        page(copied)


def test_runs_are_named_by_the_shortest_end_that_differs() -> None:
    assert unique_names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert unique_names([Path("/a/one"), Path("/b/two")]) == ["one", "two"]
    assert len(set(unique_names([Path("/a"), Path("/a")]))) == 2
