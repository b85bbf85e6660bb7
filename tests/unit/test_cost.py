import pytest

from cluster.cost import KnownPrices, get_usd_per_mtoken, load_prices
from elastic.config import CostConfig
from elastic.errors import ConfigError


def test_the_price_file_wins_over_the_configured_price(tmp_path):
    file = tmp_path / "prices.yaml"
    file.write_text("aws-g5-spot: 0.41\nvast-4090: 1\n")
    prices = load_prices(CostConfig(usd_per_gpu_hour=2.5, price_file=str(file)))
    labels = ["aws-g5-spot", "vast-4090", "other", None]
    assert [prices.get_usd_per_gpu_hour(label) for label in labels] == [0.41, 1.0, 2.5, 2.5]


@pytest.mark.parametrize("content", ["a: cheap", "a: -1", "a: true", "a: .nan", "a: .inf", "- 1", "", "a: [", "\xff"])
def test_a_bad_price_file_names_the_key_and_shows_a_good_line(tmp_path, content):
    file = tmp_path / "prices.yaml"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"cost\.price_file=.*aws-g5-spot: 0\.41"):
        load_prices(CostConfig(price_file=str(file)))


def test_a_missing_price_file_is_the_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_prices(CostConfig(price_file=str(tmp_path / "no.yaml")))


def test_dollars_per_million_tokens_wait_for_the_first_token():
    assert get_usd_per_mtoken(3.0, 0) is None
    assert get_usd_per_mtoken(3.0, 2_000_000) == 1.5


def test_a_price_file_that_is_gone_or_broken_leaves_the_prices_that_were_known(tmp_path):
    file = tmp_path / "prices.yaml"
    said: list[str] = []
    prices = KnownPrices(CostConfig(usd_per_gpu_hour=2.5, price_file=str(file)), say=said.append)
    assert prices.look().get_usd_per_gpu_hour("spot") == 2.5
    assert "cannot be read" in said[-1]
    assert "cost.usd_per_gpu_hour=2.5" in said[-1]
    file.write_text("spot: 0.41")
    assert prices.look().get_usd_per_gpu_hour("spot") == 0.41
    assert said[-1].endswith("can be read again")
    file.write_text("spot: [")
    assert prices.look().get_usd_per_gpu_hour("spot") == 0.41
    assert "is not YAML" in said[-1]
    assert "those of 1 offers that it named last" in said[-1]
    assert prices.look().get_usd_per_gpu_hour("spot") == 0.41
    assert len(said) == 3, "it says the same thing once"
