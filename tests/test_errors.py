"""Error messages are one line and contain no credentials."""

import string

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import first_line, redact_credentials

WORDS = st.text(string.ascii_letters + string.digits + "@:-_.%", min_size=1)


@given(WORDS, WORDS, st.sampled_from(["http", "postgresql", "htps"]))
def test_the_user_name_and_password_of_a_url_are_removed(name, password, scheme):
    message = redact_credentials(f"cannot reach {scheme}://{name}:{password}@host.example:5000/path: refused")
    assert message == f"cannot reach {scheme}://host.example:5000/path: refused"


@given(WORDS)
def test_a_password_in_the_query_of_a_url_is_hidden(password):
    assert (
        redact_credentials(f"postgresql://host/db?password={password}&ssl=1") == "postgresql://host/db?password=…&ssl=1"
    )


@given(st.text())
def test_the_first_line_of_an_error_is_one_line_and_never_empty(text):
    line = first_line(ValueError(text))
    assert len(line.splitlines()) == 1
