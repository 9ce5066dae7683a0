"""Some families of the zoo, each for what it alone does; ``nox -s residual_zoo`` goes over all."""

import pytest

from residual_zoo import look


@pytest.mark.parametrize(
    "family",
    [
        "olmo2",  # norms what it adds
        "opt",  # rows and positions are one axis in its MLP
        "bart",  # post-norm, with cross attention
        "beit",  # scales what it adds unit by unit
        "falcon",  # adds in place
        "cohere",  # parallel, with scaled logits
    ],
)
def test_what_is_given_is_exact_and_nothing_is_refused(family):
    found = look(family)
    assert {each.what for each in found} >= {"whole", "heads", "neurons"}
    assert [str(each) for each in found if not each.exact] == []


def test_what_a_family_does_not_have_is_refused_with_the_reason():
    refused = {each.what: each.refused for each in look("mixtral") if not each.exact}
    assert list(refused) == ["neurons"]
    assert "its experts have one each" in refused["neurons"]
