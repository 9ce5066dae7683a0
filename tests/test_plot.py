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
