"""A bundle on data elsewhere: its rows are read as those that it was measured on."""

import onnx
import pytest

from distill.data.tables import read_table
from distill.errors import DataError
from distill.export.runtime import QUANTIZED, Bundle
from distill.export.verify import Verification
from distill.recipe import DataRecipe
from distill.shipping.bundling import labelled_rows, verify_with_data


def test_what_stands_before_each_text_stands_before_those_from_elsewhere(tiny_bundle, tmp_path):
    path = tmp_path / "elsewhere.csv"
    path.write_text("text,label\nwhere is it,arrival\nwhat rate,exchange\n", encoding="utf-8")
    bundle, columns = Bundle.load(tiny_bundle), DataRecipe(train="none.csv")
    table = read_table(str(path))
    assert labelled_rows(bundle, columns, table).texts == ["where is it", "what rate"]
    bundle.prefix = "query: "  # as the metadata of its graph would have it
    assert labelled_rows(bundle, columns, table).texts == ["query: where is it", "query: what rate"]


def test_an_embedder_needs_its_teacher_to_be_measured(own_bundle, tmp_path):
    model = onnx.load(own_bundle / QUANTIZED)
    (named,) = (one for one in model.metadata_props if one.key == "distill.task")
    named.value = "sentence-embedding"
    onnx.save(model, own_bundle / QUANTIZED)
    with pytest.raises(DataError, match="a sentence-embedding bundle is measured against its teacher, which does not"):
        verify_with_data(own_bundle, str(tmp_path / "any.csv"), Verification(own_bundle))


def test_a_file_that_is_not_there_is_told_as_everywhere(own_bundle, tmp_path):
    (own_bundle / "recipe.toml").write_text('teacher.checkpoint = "m"\ndata.train = "t.csv"\n', encoding="utf-8")
    (tmp_path / "test.csv").touch()
    with pytest.raises(DataError, match=r"there is no such file\. Did you mean \S*test\.csv\?$"):
        verify_with_data(own_bundle, str(tmp_path / "tset.csv"), Verification(own_bundle))


def test_what_is_wrong_with_the_data_is_told_with_the_bundles_columns(own_bundle, tmp_path):
    (own_bundle / "recipe.toml").write_text('teacher.checkpoint = "m"\ndata.train = "t.csv"\n', encoding="utf-8")
    path = tmp_path / "a.csv"
    path.write_text("Text,label\nwhere is it,arrival\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no column 'text'; .* Mend the file: .*data.text 'text', data.label 'label'"):
        verify_with_data(own_bundle, str(path), Verification(own_bundle))
