"""``gammabeta find-rate``."""

import json


def test_the_command_prints_and_draws(gammabeta, digits_file, tmp_path):
    picture = tmp_path / "rates" / "rate.png"
    options = ["--steps", "30", "--set", "precision=fp32", "--out", picture]
    code, out, err = gammabeta("find-rate", digits_file, *options, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["recipe"] == "fast"
    assert document["low"] <= document["suggested"] <= document["high"]
    assert picture.read_bytes().startswith(b"\x89PNG")
