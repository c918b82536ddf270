import numpy as np
import pytest
from matplotlib.image import imread

from fedllm import plots


def cases(make):
    """Runs that ask different things of the figures."""
    seeded = ["fixed seed"]
    return {
        "private": make(),
        "trusted server": make(server=None),
        "no privacy": make("fedit", None, None, 0.858, 1_843_561, ["privacy disabled"]),
        "fixed seed": make(why=seeded),
        "one round": make(rounds=1),
        "text": make(accuracy=None),
    }


@pytest.mark.parametrize("case", ["private", "trusted server", "no privacy", "fixed seed", "one round", "text"])
def test_run_figure_draws_every_kind_of_run(case, fake_results, tmp_path):
    results = cases(fake_results)[case]
    path = plots.run_figure(results["history"], results, tmp_path / "run.png")
    image = imread(path)
    assert image.shape[1] == 1040 and np.ptp(image[..., :3]) > 0.9


def test_figure_says_what_the_epsilons_mean(fake_results, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: seen.append(figure))
    results = fake_results(why=["fixed seed"])
    plots.run_figure(results["history"], results, tmp_path / "run.png")
    figure = seen[0]
    quality, privacy = figure.axes
    assert "not private: fixed seed" in figure.get_suptitle()
    assert "one client" in privacy.get_title(loc="left") and "1e-4" in privacy.get_title(loc="left")
    labels = [text.get_text() for text in privacy.get_legend().get_texts()]
    assert labels == ["release: add-or-remove-one, pld, bound", "server: replace-one, gdp, bound"]
    assert privacy.get_yscale() == "log"
    np.testing.assert_allclose(quality.lines[1].get_ydata(), [76.2, 82.4])
    assert "8.00" in [text.get_text() for text in privacy.texts]


def test_no_two_texts_overlap(fake_results, tmp_path, monkeypatch):
    figures, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure) or save(figure, path))
    runs = cases(fake_results)
    for results in runs.values():
        plots.run_figure(results["history"], results, tmp_path / "run.png")
    del runs["text"]
    plots.rounds_figure(runs, tmp_path / "rounds.png")
    plots.bytes_figure(runs, tmp_path / "bytes.png")
    for figure in figures:
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
        for number, (one, box) in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, f"{one!r} is cut"
            for other, other_box in boxes[:number]:
                assert not box.overlaps(other_box), f"{one!r} overlaps {other!r}"


def texts(figure):
    """Every text that is drawn: titles, labels, legends, annotations, ticks in view."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    found = [text for legend in legends for text in legend.get_texts()]
    found += [figure._suptitle] if figure.get_suptitle() else []
    for axes in figure.axes:
        found += [*axes.texts, axes._left_title, axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=False)  # none on a shared axis
            found += [label for place, label in labels if low <= place <= high]
    return [text for text in found if text.get_visible() and text.get_text().strip()]
