"""Pictures hold what the scores say."""

import pytest
import torch
from tensordict import TensorDict

from tdcache import plot

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_image_maps_show_one_row_per_image_and_one_column_per_method():
    images, scores = torch.rand(3, 1, 8, 8), TensorDict({"a": torch.randn(3, 2, 8, 8), "b": torch.randn(3, 4, 4)}, [3])
    figure = plot.image_maps(images, scores, titles=["x", "y", "z"])
    panels = figure.axes
    assert len(panels) == 9
    assert [panel.get_title() for panel in panels[:3]] == ["", "a", "b"]
    shown = torch.tensor(panels[1].images[0].get_array().tolist())
    torch.testing.assert_close(shown, scores["a"][0].sum(0))
    assert panels[1].images[0].get_clim() == pytest.approx((-shown.abs().max().item(), shown.abs().max().item()))


def test_tokens_are_coloured_by_sign_and_size():
    axes = plot.tokens(["good", "bad", "so"], torch.tensor([1.0, -1.0, 0.0]))
    assert [text.get_text() for text in axes.texts] == ["good", "bad", "so"]
    red, blue, white = (box.get_facecolor() for box in axes.patches)
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert min(white[:3]) > 0.9


def test_token_html_escapes_words_and_fades_with_the_score():
    html = plot.token_html(["<s>", "x"], torch.tensor([-2.0, 1.0]))
    assert "&lt;s&gt;" in html
    assert "rgba(5,113,176,1.00)" in html
    assert "rgba(202,0,32,0.50)" in html
    with pytest.raises(ValueError, match="2 words need as many scores"):
        plot.token_html(["a", "b"], torch.zeros(2, 3))


def test_a_layer_map_has_a_row_per_layer_and_a_column_per_position():
    scores = TensorDict({"layers.0": torch.tensor([0.0, 1.0]), "layers.1": torch.tensor([-2.0, 0.5])}, [])
    axes = plot.layer_map(scores, words=["a", "b"])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layers.0", "layers.1"]
    assert axes.collections[0].get_array().reshape(2, 2).tolist() == [[0.0, 1.0], [-2.0, 0.5]]
    with pytest.raises(ValueError, match="one score per position"):
        plot.layer_map({"a": torch.zeros(2, 3)})


def test_an_edge_graph_draws_the_edges_above_the_threshold_and_their_nodes():
    edges = TensorDict(
        {"embed": {"ln1": torch.tensor(1.0), "ln_f": torch.tensor(0.01)}, "attn": {"ln_f": torch.tensor(-0.5)}}
    )
    order = ["embed", "ln1", "attn", "ln_f"]
    axes = plot.edge_graph(edges, order=order, threshold=0.1, labels={"ln_f": "logits"})
    assert len(axes.patches) == 2
    assert sorted(text.get_text() for text in axes.texts) == ["attn", "embed", "ln1", "logits"]
    widths = sorted(patch.get_linewidth() for patch in axes.patches)
    assert widths[1] > widths[0]
    with pytest.raises(ValueError, match=r"order= has no place for \['ln_f'\]"):
        plot.edge_graph(edges, order=order[:3])


NAN = float("nan")
GREY = (0.75, 0.75, 0.75, 1.0)


def test_missing_scores_are_grey_and_outside_the_range_of_the_colours():
    maps = plot.image_maps(torch.rand(1, 2, 2), {"a": torch.tensor([[[NAN, 1.0], [-2.0, 0.0]]])}).axes[1].images[0]
    mesh = plot.layer_map({"a": torch.tensor([NAN, 1.0]), "b": torch.tensor([-2.0, float("inf")])}).collections[0]
    for shown in (maps, mesh):
        assert shown.get_clim() == (-2, 2)
        assert shown.get_array().mask.reshape(-1).tolist() == [True, False, False, False]
        assert tuple(shown.get_cmap().get_bad()) == GREY
    boxes = plot.tokens(["a", "b"], torch.tensor([NAN, 0.5])).patches
    assert boxes[0].get_facecolor() == GREY
    assert boxes[1].get_facecolor() == plot.tokens(["b"], torch.tensor([0.5])).patches[0].get_facecolor()
    html = plot.token_html(["a", "b"], torch.tensor([NAN, 0.5]))
    assert "rgba(191,191,191,1.00);color:#000" in html
    assert "rgba(202,0,32,1.00);color:#fff" in html
    arrows = plot.edge_graph({"a": {"b": NAN, "c": 2.0}}, order=["a", "b", "c"]).patches
    assert [arrow.get_edgecolor() == GREY for arrow in sorted(arrows, key=lambda arrow: arrow.get_linewidth())] == [
        True,
        False,
    ]


def test_dollars_are_drawn_as_they_are():
    words = ["$", r"$\frac$", "a_b$"]  # the second one is no mathematics, and cannot be drawn as such
    figures = [
        plot.image_maps(torch.rand(1, 2, 2), {words[1]: torch.rand(1, 2, 2)}, titles=[words[1]]),
        plot.tokens(words, torch.zeros(3)).figure,
        plot.layer_map({words[1]: torch.zeros(3)}, words=words).figure,
        plot.edge_graph({"a": {"b": 1.0}}, order=["a", "b"], labels={"a": words[1]}).figure,
    ]
    for figure in figures:
        figure.canvas.draw()


def test_rows_words_and_labels_that_do_not_match_are_errors():
    images = torch.rand(2, 4, 4)
    with pytest.raises(ValueError, match=r"'a' has 3 rows for 2 images; give one of each, in the same order"):
        plot.image_maps(images, {"a": torch.rand(3, 4, 4)})
    with pytest.raises(ValueError, match=r"'titles' has 3 rows for 2 images"):
        plot.image_maps(images, {"a": images}, titles=["x", "y", "z"])
    with pytest.raises(ValueError, match=r"words= has 3 words for 2 positions"):
        plot.layer_map({"a": torch.zeros(2)}, words=["x", "y", "z"])
    with pytest.raises(ValueError, match=r"labels= has 2 labels for 1 layers"):
        plot.layer_map({"a": torch.zeros(2)}, labels=["x", "y"])


def test_a_layer_map_takes_keys_of_any_kind_and_its_bar_shows_signs():
    row = torch.tensor([-1.0, 1.0])
    for scores in ({0: row, ("mlp", 1): row}, TensorDict({"0": row, "mlp": {"1": row}}, [])):
        axes = plot.layer_map(scores)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "mlp.1"]
        axes.figure.canvas.draw()
        ticks = {label.get_text() for label in axes.figure.axes[1].get_yticklabels()}
        assert {"+1", "0", "−1"} <= ticks


def test_layers_whose_keys_read_the_same_are_all_drawn():
    row = torch.tensor([-1.0, 1.0])
    axes = plot.layer_map({0: row, "0": row, ("0",): row})
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "0", "0"]


@pytest.mark.parametrize(
    ("scores", "got"),
    [
        ({}, "no layers"),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, r"\(2,\) and \(3,\)"),
        ({"a": torch.zeros(2, 4)}, r"\(2, 4\)"),
    ],
)
def test_layers_need_scores_of_one_length(scores, got):
    with pytest.raises(ValueError, match=rf"one score per position, as many in every layer; got {got}$"):
        plot.layer_map(scores)


def test_a_label_draws_a_colour_bar_that_several_lines_can_share():
    maps = plot.image_maps(torch.rand(1, 2, 2), {"a": torch.rand(1, 2, 2)}, label="score")
    assert [axes.get_ylabel() for axes in maps.axes[2:]] == ["score"]
    graph = plot.edge_graph({"a": {"b": -2.0}}, order=["a", "b"], label="change of the logit")
    assert graph.figure.axes[1].get_ylabel() == "change of the logit"
    assert graph.figure.axes[1].get_ylim() == (-2, 2)
    _, (first, second) = plt.subplots(2, 1)
    for line, scores in ((first, torch.tensor([2.0])), (second, torch.tensor([1.0]))):
        plot.tokens(["a"], scores, axes=line, limit=2.0)
    bar = plot.color_bar([first, second], limit=2.0, label="added")
    for line, value in ((first, 2.0), (second, 1.0)):
        assert line.patches[0].get_facecolor() == bar.cmap(bar.norm(value))


def test_positions_without_words_are_numbered_at_the_centres_of_their_columns():
    axes = plot.layer_map({"a": torch.zeros(30)})
    assert axes.get_xticks().tolist() == [at + 0.5 for at in range(0, 30, 3)]
    assert [label.get_text() for label in axes.get_xticklabels()][:2] == ["0", "3"]
    assert axes.get_xlabel() == "position"
