"""Pictures of experiments: a PNG and the numbers behind it."""

from sextant.lab.pictures import bars


def test_bars_leave_a_picture_and_their_numbers(tmp_path):
    cells = {("one, two", 0): {"read": 3.0, "union": 5.5}, ("one, two", 1): {"read": 3.0, "union": 6.5}}
    bars(tmp_path / "reads.png", cells, {"read": "a head", "union": "a group"}, ylabel="blocks", title="Reads")
    assert (tmp_path / "reads.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "reads.csv").read_text().splitlines() == [
        "arm,seed,read,union", '"one, two",0,3.0,5.5', '"one, two",1,3.0,6.5',
    ]
