"""The list of models is what the registry and the tests say."""

from docs.supported_models import PAGE, page


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m docs.supported_models"


def test_enough_architectures_without_a_file():
    rows = page().split("## Through")[1].split("## Refused")[0].splitlines()
    assert (
        sum(row.endswith("ForCausalLM` |  |") or row.endswith("LMHeadModel` |  |") for row in rows)
        >= 25
    )
