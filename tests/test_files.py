import csv
import gzip
import io

import numpy as np
import pandas as pd
import pytest
from conftest import error_message, file_error_message
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
    files.write_csv(tmp_path / "names.csv", pd.DataFrame({"source": ["001"], "slice": ["1"], "stratum": ["2"]}))
    assert files.read_csv(tmp_path / "names.csv").to_numpy().tolist() == [["001", "1", "2"]]


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


def read(data: bytes, columns=("a", "b")) -> pd.DataFrame:
    return files.read_text_table(io.BytesIO(data), "table.csv", columns)


@pytest.mark.parametrize(
    "data",
    [
        b"a,b\n1,x y\n2,\n", b"a;b\r\n1;x y\r\n2;\r\n", b"a\tb\n1\tx y\n2\t", b"a|b\n1|x y\n2|\n",
        b" a , b\n 1 , x y \n2,\n",
        b'"a","b"\n"1","x y"\n"2",""', b'a, b\n1, "x y"\n2, ""\n', "\ufeffa,b\n1,x y\u00a0\n2,\u200b\n".encode(),
        "a;b\n1;x y\n2;\n".encode("utf-16"), b"\xfe\xff" + "a,b\n1,x y\n2,\n".encode("utf-16-be"), b"A,B\n1,x y\n2,\n",
        b"a,b\n1,x y\n2,\n,\n\n , \n", b"a,b\r1,x y\r2,\r", b"sep=;\r\na;b\r\n1;x y\r\n2;\r\n",
        b'"sep=,"\na,b\n1,x y\n2,\n', b'\n \r\na,b\n="1","=""x y"""\n=" 2",=""\n',
    ],
)  # fmt: skip
def test_tables_are_read_as_programs_write_them(data):
    assert read(data).to_dict("list") == {"a": ["1", "2"], "b": ["x y", ""]}


def test_quoted_fields_have_separators_and_lines():
    assert read(b'a,b\n"1;2,3","x\ny"\n').to_dict("list") == {"a": ["1;2,3"], "b": ["x\ny"]}


def test_the_separator_is_that_which_gives_the_columns():
    assert read(b"a;b;c,d;e,f,g,h,i\n1;2;3;4\n").columns.tolist() == ["a", "b", "c,d", "e,f,g,h,i"]


def test_a_table_of_one_column_without_a_final_newline_is_read():
    assert read(b"a\n1\n\n2", ["a"])["a"].to_dict() == {0: "1", 2: "2"}  # the index is that of the lines


def test_columns_may_differ_in_case_if_only_one_does():
    assert read(b"A,a,B\n1,2,3\n")[["a", "b"]].to_numpy().tolist() == [["2", "3"]]


def test_a_repeated_column_is_named():
    assert error_message(read, b"a,b,b \n1,2,3\n") == "table.csv: column 'b' occurs 2 times; rename or delete one"


def test_a_table_in_windows_1252_is_read_with_a_warning(caplog):
    assert read("a,b\n1,M\u00fcller\n".encode("cp1252"))["b"].tolist() == ["M\u00fcller"]
    (message,) = caplog.messages
    assert message.startswith(
        "table.csv line 2: not encoded in UTF-8; read as Windows-1252: '1,M\u00fcller'; if that is"
    )


@pytest.mark.parametrize(
    "data", [b"a,b\n1,\x81\x9d\n", b"\xff\xfea", "a,b\n1,2\n".encode("utf-16-le"), b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"]
)
def test_other_encodings_and_no_tables_are_an_error_of_one_line(data):
    message = error_message(read, data)
    assert message.startswith("table.csv")
    assert message.endswith("so it is not a CSV table; save it as CSV in UTF-8")


def test_a_compressed_table_is_read_and_a_damaged_one_named(tmp_path):
    path = tmp_path / "table.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n1,2\n"))
    assert files.read_text_table(path, str(path), ["a"]).to_dict("list") == {"a": ["1"], "b": ["2"]}
    path.write_bytes(path.read_bytes()[:-4])
    assert file_error_message(lambda path: files.read_text_table(path, f"{path}: table", ["a"]), path).startswith(
        "table is damaged"
    )


def test_the_index_is_that_of_the_lines_also_below_what_stands_before_the_header():
    assert read(b"\nsep=;\na;b\n1;2\n").index.tolist() == [2]  # on line 4


FIELDS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r="), max_size=8)  # no ="001" of Excel


@given(
    st.lists(st.tuples(FIELDS, FIELDS), max_size=5),
    st.sampled_from(",;\t|"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_every_text_is_read_back(rows, separator, encoding):
    table = pd.DataFrame([("x", *row) for row in rows], columns=["key", "a", "b"])
    text = table.to_csv(index=False, sep=separator, lineterminator="\n", quoting=csv.QUOTE_ALL)
    result = read(text.encode(encoding))
    assert result.to_numpy().tolist() == [["x", *(field.strip(files.BLANKS) for field in row)] for row in rows]
