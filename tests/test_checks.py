"""What no data could mend is refused before anything is loaded, and leaves no trace in the output folder."""

import pytest

from distill.errors import DistillError
from distill.pipeline import run_stages
from distill.recipe import Recipe


@pytest.mark.parametrize(
    ("section", "values", "problem"),
    [
        ("student", {"card": "layer-4"}, r"there is no student card 'layer-4'. Did you mean layers-4"),
        ("student", {"activation": "gelo"}, r"`student.activation` must be known to transformers, .*; got 'gelo'"),
        ("objective", {"preset": "logit"}, r"preset 'logit' does not exist. Did you mean 'logits'"),
        ("objective", {"terms": [{"loss": "nope"}, {"loss": "logits_ms"}]}, r"'nope' does not exist.*'logits_ms'"),
        ("objective", {"terms": [{"loss": "hidden_mse", "weight": -1.0}]}, r"weight of hidden_mse must not be neg"),
        ("objective", {"terms": [{"loss": "soft_labels", "temperature": 0.0}]}, r"temperature of .* above 0"),
        ("objective", {"terms": [{"loss": "soft_labels", "options": {"betta": 1}}]}, r"no option 'betta'"),
    ],
)
def test_names_that_mean_nothing_are_refused_first(section, values, problem, tmp_path):
    sections = {"teacher": {"start": "no/such-model"}, "data": {"train": "no.csv"}, section: values}
    recipe = Recipe.parse({**sections, "output": str(tmp_path / "run")})
    with pytest.raises(DistillError, match=problem):
        run_stages(recipe, until="compress")
    assert not (tmp_path / "run").exists()
