"""`solvent simulate` and `solvent offers`, as users and scripts call them."""

import json
from pathlib import Path

import pytest

from cluster.cli import main

CONFIG = str(Path(__file__).parents[2] / "configs" / "8b-8xh100-spot.yaml")
KEYS = {"goodput", "fleet_share", "wall_h", "usd", "losses", "steps_redone"}
FLEET = "t_s,event,node\n0,add,a\n0,add,b\n600,remove,a\n900,add,c\n3600,remove,b\n"


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_json_has_every_policy_with_what_scripts_read(tmp_path, capsys):
    path = tmp_path / "fleet.csv"
    path.write_text(FLEET)
    assert main(["simulate", str(path), "--gang", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    policies = {"fixed-30min", "young", "jit", "solvent", "gang-2"}
    assert policies <= said.keys()
    assert said["traces"]["fleet"].keys() == policies
    assert all(said[policy].keys() >= KEYS for policy in policies)
    # 600 s of two, 300 of one, 2700 of two: 1.9167 node-hours at a dollar
    assert said["jit"]["usd"] == pytest.approx(6900 / 3600, abs=1e-3)
    assert said["gang-2"]["usd"] == pytest.approx(6600 / 3600, abs=1e-3)  # pays for two or none


def test_the_planner_gives_a_node_its_speed_and_price(tmp_path, capsys):
    path = tmp_path / "fleet.csv"
    path.write_text(FLEET)
    offer = "azure/Standard_ND96isr_H100_v5/eastus/spot"
    assert main(["simulate", str(path), "--config", CONFIG, "--offer", offer, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["solvent"]["usd"] == pytest.approx(18.1695 * 6900 / 3600, rel=1e-3)
    assert 0.01 < said["solvent"]["usd_per_mtoken"] < 1


def test_pictures_are_written_where_asked(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["simulate", "--generate", "nodes=3,hours=5", "--plot", str(page)]) == 0
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["--generate", "nodes=x"], ["--generate", "nodes=2,hours=nan"], ["nowhere.csv"], ["NEGATIVE"], ["NAN"]),
        ["EMPTY"],
        *(
            ["FLEET", *wrong]
            for wrong in (
                ["--min-nodes", "0"],
                ["--min-nodes", "5", "--max-nodes", "4"],
                ["--gang", "-1"],
                ["--save-s", "nan"],
                ["--recovery-s", "-3"],
                ["--usd-per-node-hour", "0"],
                ["--step-node-s", "0"],
                ["--slack", "1.0"],
                ["--slack", "1.5", "--windows", "0"],
                ["--slack", "1.5", "--work-h", "-1"],
                ["--plot", "nowhere/page.html"],
                ["--config", CONFIG],
                ["--config", CONFIG, "--offer", "nobody"],
            )
        ),
    ],
)
def test_what_cannot_be_simulated_is_refused(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {"FLEET": "0,4\n3600,2\n7200,4", "NEGATIVE": "0,-4\n9,1", "NAN": "nan,4\n9,1", "EMPTY": "0,0\n3600,0"}
    for name, text in rows.items():
        (tmp_path / name).write_text(f"t_s,nodes\n{text}\n")
    try:
        code = main(["simulate", *arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_offers_can_be_asked_for_by_gpu_and_written_as_a_catalog_that_is_read_again(tmp_path, capsys):
    assert main(["offers", "--gpu", "H100", "--kind", "spot", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {offer["gpu"] for offer in said["offers"]} == {"H100-SXM"}
    assert [o["usd_per_gpu_hour"] for o in said["offers"]] == sorted(o["usd_per_gpu_hour"] for o in said["offers"])
    assert main(["offers", "--gpu", "L40S", "--csv"]) == 0
    path = tmp_path / "own.csv"
    path.write_text(capsys.readouterr().out)
    assert main(["offers", "--catalog", str(path), "--json"]) == 0
    assert {offer["gpu"] for offer in json.loads(capsys.readouterr().out)["offers"]} == {"L40S"}
    assert main(["offers", "--gpu", "X1000"]) == 2


def test_the_age_that_offers_tell_is_that_of_the_prices_they_show(capsys):
    assert main(["offers", "--gpu", "T4"]) == 0
    assert "prices as of 2026-01-21: " in capsys.readouterr().err
    assert main(["offers", "--provider", "nobody"]) == 0
    assert "0 offers; no prices" in capsys.readouterr().err
