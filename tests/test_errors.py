"""What an error says is one line and holds no secret."""

import string

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import first_line, redact_credentials

WORDS = st.text(string.ascii_letters + string.digits + "@:-_.%", min_size=1)


@given(WORDS, WORDS, st.sampled_from(["http", "postgresql", "htps"]))
def test_no_name_and_no_password_of_a_url_is_left(name, password, scheme):
    said = redact_credentials(f"cannot reach {scheme}://{name}:{password}@host.example:5000/path: refused")
    assert said == f"cannot reach {scheme}://host.example:5000/path: refused"


@given(WORDS)
def test_a_password_among_the_options_of_a_url_is_hidden(password):
    assert (
        redact_credentials(f"postgresql://host/db?password={password}&ssl=1") == "postgresql://host/db?password=…&ssl=1"
    )


@given(st.text())
def test_what_an_error_says_is_one_line_and_never_nothing(text):
    said = first_line(ValueError(text))
    assert len(said.splitlines()) == 1
