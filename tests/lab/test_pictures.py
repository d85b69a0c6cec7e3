"""Pictures of experiments: a PNG and the numbers behind it."""

from sextant.lab.pictures import bars, gaps, numbers


def test_bars_leave_a_picture_and_their_numbers(tmp_path):
    cells = {("one, two", 0): {"read": 3.0, "union": 5.5}, ("one, two", 1): {"read": 3.0, "union": 6.5}}
    bars(tmp_path / "reads.png", cells, {"read": "a head", "union": "a group"}, ylabel="blocks", title="Reads")
    assert (tmp_path / "reads.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "reads.csv").read_text().splitlines() == [
        "arm,seed,read,union", '"one, two",0,3.0,5.5', '"one, two",1,3.0,6.5',
    ]


def test_numbers_of_cells_in_a_row_each(tmp_path):
    numbers(tmp_path / "a.csv", {("a b", 0): {"loss": 1.5, "n": 2}, ("a b", 1): {"loss": 1 / 3, "n": 0}}, ["n", "loss"])
    assert (tmp_path / "a.csv").read_text().splitlines() == [
        "arm,seed,n,loss", "a b,0,2.00000,1.50000", "a b,1,0.00000,0.33333",
    ]


def test_gaps_from_two_bases_with_one_seed_or_more(tmp_path):
    groups = {"minus a": {"b": [0.1, -0.2], "c": [0.3, 0.4]}, "minus d": {"e": [1.0]}}
    gaps(tmp_path / "gaps.png", groups, xlabel="loss", title="Gaps")
    assert (tmp_path / "gaps.png").read_bytes().startswith(b"\x89PNG")
