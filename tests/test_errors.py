"""Errors are one line: where, what, what to do; each kind has its own exit code."""

from distill import errors


def test_an_error_is_one_line():
    error = errors.DataError("column 'txt'\nis not there", where="train.csv", fix="Set data.text.")
    assert str(error) == "train.csv: column 'txt' is not there. Set data.text."
    assert str(errors.DataError("what?")) == "what?"


def test_every_kind_has_its_own_exit_code():
    kinds = errors.DistillError.__subclasses__()
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes
    assert all(f"{kind.__name__}" in (errors.__doc__ or "") for kind in kinds)


def test_a_missing_extra_names_the_install():
    assert 'pip install "distill[train]"' in str(errors.needs_extra("train", "torch"))
