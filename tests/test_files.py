import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import files


def test_tables_are_written_in_one_format(tmp_path):
    table = pd.DataFrame(
        {
            "file": ["0001", "NA", ""],
            "float64": [1 / 3, 1e-10, np.nan],
            "float32": np.array([0.1, 1.0, 123456789.0], dtype=np.float32),
            "count": [1, 20, 300],
            "flag": [True, False, True],
        }
    )
    files.write_csv(tmp_path / "folder/table.csv", table)
    assert (tmp_path / "folder/table.csv").read_bytes() == (
        b"file,float64,float32,count,flag\n"
        b"0001,0.333333333,0.100000001,1,True\n"
        b"NA,1e-10,1,20,False\n"
        b",,123456792,300,True\n"
    )
    read = files.read_csv(tmp_path / "folder/table.csv")
    assert read["file"].fillna("").tolist() == ["0001", "NA", ""]
    assert read["float64"].isna().tolist() == [False, False, True]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_every_float32_is_the_same_after_writing_and_reading(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("table") / "table.csv"
    column = np.array(values, dtype=np.float32)
    files.write_csv(path, pd.DataFrame({"value": column}))
    assert np.array_equal(files.read_csv(path)["value"].to_numpy().astype(np.float32), column)


def test_json_is_written_in_one_format(tmp_path):
    content = {"b": 1 / 3, "a": [1, None, True], "é": "ü"}
    files.write_json(tmp_path / "content.json", content)
    assert (tmp_path / "content.json").read_text(encoding="utf-8") == (
        '{\n  "b": 0.3333333333333333,\n  "a": [\n    1,\n    null,\n    true\n  ],\n  "é": "ü"\n}\n'
    )
    assert files.read_json(tmp_path / "content.json") == content
