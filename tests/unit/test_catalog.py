"""Offers and GPUs: what is a price, whose it is and of which day."""

import csv
import io
from collections import Counter
from datetime import date

import pytest

from cluster.catalog.gpus import SPECS, get_spec
from cluster.catalog.load import SNAPSHOT, Catalog, load_catalog, override
from cluster.catalog.offers import build_offer, dump_csv, keep_prices, read_csv
from cluster.catalog.skypilot import is_skypilot, read_skypilot
from elastic.errors import ConfigError
from elastic.training.metrics import get_peak_flops

TODAY = date(2026, 11, 30)
DEVICES = {  # as torch.cuda.get_device_name says
    "T4": "Tesla T4",
    "V100": "Tesla V100-SXM2-16GB",
    "RTX3090": "NVIDIA GeForce RTX 3090",
    "RTX4090": "NVIDIA GeForce RTX 4090",
    "RTX5090": "NVIDIA GeForce RTX 5090",
    "A10G": "NVIDIA A10G",
    "L4": "NVIDIA L4",
    "L40S": "NVIDIA L40S",
    "A40": "NVIDIA A40",
    "A6000": "NVIDIA RTX A6000",
    "A100-40GB-PCIe": "NVIDIA A100-PCIE-40GB",
    "A100-40GB-SXM": "NVIDIA A100-SXM4-40GB",
    "A100-80GB-PCIe": "NVIDIA A100 80GB PCIe",
    "A100-80GB-SXM": "NVIDIA A100-SXM4-80GB",
    "H100-PCIe": "NVIDIA H100 PCIe",
    "H100-NVL": "NVIDIA H100 NVL",
    "H100-SXM": "NVIDIA H100 80GB HBM3",
    "H200": "NVIDIA H200",
    "B200": "NVIDIA B200",
    "MI300X": "AMD Instinct MI300X",
}


def offer(**values):
    defaults = {"provider": "aws", "region": "r", "instance": "i", "gpu": "H100-SXM", "gpus": 8, "kind": "on-demand"}
    return build_offer(**{**defaults, "usd_per_hour": 16.0, "source": "s", "date": TODAY, **values})


@pytest.mark.parametrize("name", SPECS)
def test_a_run_s_mfu_and_the_plan_s_speed_are_of_the_same_peak(name):
    assert SPECS[name].bf16_flops == get_peak_flops(DEVICES[name])


def test_what_tensors_may_take_is_less_than_what_the_box_says():
    assert all(spec.usable_gib < spec.memory_gib for spec in SPECS.values())
    assert SPECS["RTX4090"].usable_gib == pytest.approx(21.5, abs=0.1)  # 23.5 less 3 % and 1.3 GiB


@pytest.mark.parametrize(("typed", "meant"), [("H1000", "H100-SXM"), ("RTX50900", "RTX5090"), ("A10080G", "A100")])
def test_a_gpu_that_is_typed_wrongly_is_told_what_was_meant(typed, meant):
    with pytest.raises(ConfigError, match=f"Did you mean {meant}"):
        get_spec(typed)


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ConfigError, match=r"X1000.* would be guesses"):
        get_spec("X1000")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("A100-80GB", "A100-80GB-SXM"),
        ("H100", "H100-SXM"),
        ("RTXA6000", "A6000"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
    ],
)
def test_a_gpu_is_known_by_the_names_that_catalogs_use(said, name):
    assert get_spec(said).name == name


def test_every_price_that_ships_has_its_source_and_day_and_a_gpu_that_we_know():
    rows = list(csv.DictReader(io.StringIO(SNAPSHOT.read_text())))
    assert len(rows) > 200
    assert [row for row in rows if not row["source"] or row["gpu"] not in SPECS] == []
    assert {date.fromisoformat(row["date"]).year for row in rows} == {2026}
    catalog = load_catalog()
    assert len(catalog.offers) == len(rows)  # none of them is no price
    assert catalog.left_out == {}
    assert {offer.gpu for offer in catalog.offers} == set(SPECS)  # none that we know of is without a price


def test_a_row_without_a_source_is_refused():
    text = dump_csv([offer()]).replace(",s,", ",,")
    with pytest.raises(ConfigError, match=r"line 2: it names no source"):
        read_csv(text, name="mine.csv")


def test_what_is_written_is_read_again():
    offers = [offer(), offer(kind="spot", usd_per_hour=5.5, network_gbits=3200.0)]
    assert read_csv(dump_csv(offers), name="x").offers == offers


def test_zero_and_a_spot_price_that_is_the_full_price_are_not_prices():
    offers = [
        offer(),
        offer(kind="spot"),
        offer(instance="free", usd_per_hour=0.0),
        offer(kind="spot", zone="b", usd_per_hour=4),
    ]
    read = keep_prices(offers)
    assert [o.usd_per_hour for o in read.offers] == [16.0, 4]
    assert read.left_out == Counter({"a price of 0": 1, "spot that costs as much as on-demand": 1})


SKYPILOT = """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone
m5.large,,,2.0,8.0,,0.096,0.04,us-east-1,use1-az1
g6.xlarge,L4,1.0,4.0,16.0,"{'Gpus': [{'Name': 'L4', 'Count': 1}]}",0.8048,0.3,us-east-1,use1-az1
g6.xlarge,L4,1.0,4.0,16.0,,0.8048,0.8048,us-east-1,use1-az2
g6f.large,L4,0.125,2.0,8.0,,0.2,,us-east-1,use1-az1
p5.48xlarge,H100,8.0,192.0,2048.0,,55.04,,us-east-2,use2-az1
"""


def test_skypilot_s_catalog_is_read_as_it_is():
    assert is_skypilot(SKYPILOT)
    read = read_skypilot(SKYPILOT, provider="aws", day=TODAY, name="aws/vms.csv")
    assert [(o.instance, o.zone, o.gpu, o.gpus, o.kind, o.usd_per_hour) for o in read.offers] == [
        ("g6.xlarge", "use1-az1", "L4", 1, "on-demand", 0.8048),
        ("g6.xlarge", "use1-az1", "L4", 1, "spot", 0.3),
        ("g6.xlarge", "use1-az2", "L4", 1, "on-demand", 0.8048),
        ("p5.48xlarge", "use2-az1", "H100-SXM", 8, "on-demand", 55.04),
    ]
    assert read.left_out == Counter({"a part of a GPU": 1, "spot that costs as much as on-demand": 1})


def test_the_least_bid_on_vast_is_not_a_price():
    read = read_skypilot(SKYPILOT, provider="vast", day=TODAY, name="vast/vms.csv")
    assert {o.kind for o in read.offers} == {"on-demand"}
    assert read.left_out["the least bid of a marketplace"] == 2


def test_a_catalog_of_skypilot_is_taken_by_its_path(tmp_path):
    path = tmp_path / "aws" / "vms.csv"
    path.parent.mkdir()
    path.write_text(SKYPILOT)
    assert {o.provider for o in load_catalog(catalogs=(str(path),)).offers} == {"aws"}


def test_a_user_s_price_wins_and_says_whose_it_is():
    offers = override([offer(), offer(kind="spot", usd_per_hour=4)], {"aws/*/on-demand": 1.5}, name="prices.yaml")
    assert [(o.usd_per_hour, o.source) for o in offers] == [(12.0, "prices.yaml"), (4, "s")]


def test_a_user_may_have_offers_of_his_own():
    row = {
        "provider": "us",
        "gpu": "RTX 4090",
        "gpus": 4,
        "usd_per_gpu_hour": 0.2,
        "kind": "reserved",
        "network_gbits": 10,
    }
    (own,) = override([], [row], name="prices.yaml")
    assert (own.id, own.gpu, own.usd_per_hour, own.kind) == ("us/4xRTX 4090/own/reserved", "RTX4090", 0.8, "reserved")


@pytest.mark.parametrize(
    "content",
    [
        *({"nobody/*": 1.0}, {"aws/*": 0}, {"aws/*": "cheap"}, {"aws/*": float("inf")}, {}, "x"),
        *([{"gpu": "L4"}], ["L4"], [{"gpu": 4, "usd_per_gpu_hour": 1.0}]),
        *(
            [{"gpu": "L4", "usd_per_gpu_hour": 1.0} | wrong]
            for wrong in (
                {"usd_per_gpu_hour": "abc"},
                {"usd_per_gpu_hour": float("nan")},
                {"gpus": True},
                {"gpus": 0},
                {"kind": "free"},
                {"network_gbits": "fast"},
                {"max_nodes": -3},
                {"losses_per_hour": -1},
                {"date": "yesterday"},
                {"colour": "blue"},
            )
        ),
    ],
)
def test_prices_that_mean_nothing_are_refused(content):
    with pytest.raises(ConfigError, match=r"prices\.yaml"):
        override([offer()], content, name="prices.yaml")


def test_old_prices_are_said_to_be_old():
    catalog = Catalog(offers=(offer(date=date(2026, 10, 1)),), left_out={})
    assert catalog.describe_age(date(2026, 10, 20)) == "prices as of 2026-10-01"
    assert "60 days old" in catalog.describe_age(TODAY)


def test_a_failure_is_expected_more_often_of_spot_than_of_on_demand():
    assert offer(kind="spot").losses_per_hour == pytest.approx(0.060 + 8 * 419 / (54 * 24 * 16384))
    assert offer().losses_per_hour == pytest.approx(8 * 1.97e-5, rel=0.01)


GPUHUNT_COLUMNS = "instance_name,location,price,cpu,memory,gpu_count,gpu_name,gpu_memory,spot,disk_size,gpu_vendor"
GPUHUNT = f"""{GPUHUNT_COLUMNS}
p5.48xlarge,us-east-1,55.04,192,2048,8,H100,80,False,,nvidia
p5.48xlarge,us-east-1,20.5,192,2048,8,H100,80,True,,nvidia
a2-ultragpu-1g,us-central1,5.07,12,170,1,A100,80,False,,nvidia
"""


# gpuhunt 0.1.34 leaves the file of a catalog open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_gpuhunt_s_own_reader_brings_todays_prices(tmp_path, monkeypatch):
    pytest.importorskip("gpuhunt")
    from cluster.catalog.gpuhunt import fetch_offers

    (tmp_path / "aws.csv").write_text(GPUHUNT)
    monkeypatch.setenv("GPUHUNT_CATALOG_DIR", str(tmp_path))
    offers = {(o.gpu, o.kind): o for o in fetch_offers(day=TODAY, folder=str(tmp_path)).offers}
    assert {key: o.usd_per_hour for key, o in offers.items()} == {
        ("H100-SXM", "on-demand"): 55.04,
        ("H100-SXM", "spot"): 20.5,
        ("A100-80GB-SXM", "on-demand"): 5.07,
    }
    assert offers["H100-SXM", "spot"].source.startswith("gpuhunt 0.1.")


def test_a_catalog_that_is_not_there_is_named(tmp_path):
    pytest.importorskip("gpuhunt")
    from cluster.catalog.gpuhunt import fetch_offers

    with pytest.raises(ConfigError, match="GPUHUNT_CATALOG_DIR"):
        fetch_offers(day=TODAY, folder=str(tmp_path))
