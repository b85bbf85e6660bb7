"""The table of strategies in elastic/README.md says what the files of those that we ship say of themselves."""

from pathlib import Path

import pytest

from elastic import plugins

ROWS = (Path(plugins.__file__).parent / "README.md").read_text().splitlines()


@pytest.mark.parametrize("kind", ["auto", "ddp", "deepspeed", "fsdp2", "hsdp", "single"])
def test_the_table_says_of_a_strategy_what_its_file_says(kind):
    def ask(name):
        return plugins.read_constant("elastic.strategies", kind, name)

    most, unit, cannot = ask("MAX_WORLD_SIZE"), ask("WORLD_SIZE_MULTIPLE_OF"), ask("CANNOT") or {}
    ranks = f"at most {most}" if most else f"multiples of `{unit}`" if unit else "any"
    refused = [f"`{key}`: {', '.join(map(str, values)).lower()}" for key, values in cannot.items()]
    assert f"| `{kind}` | {ask('SHARDED_OVER') or 'nothing'} | {ranks} | {'; '.join(refused) or 'nothing'} |" in ROWS
