"""Whose word counts for W&B: the configuration's where it says something, else that of W&B's own environment."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import RunConfig, WandbConfig
from elastic.sinks._wandb_choice import choose


def make(env, **wanted):
    return choose(RunConfig(run="r", wandb=WandbConfig(**wanted)), env, folder="/runs/r")


def test_without_a_word_from_anybody_it_is_offline_in_a_project_of_ours():
    choice = make({})
    assert (choice.mode, choice.project, choice.entity) == ("offline", "solvent", None)
    assert (choice.name, choice.dir, choice.overruled) == ("r", "/runs/r", ())


@pytest.mark.parametrize(
    ("env", "mode"),
    [
        ({"WANDB_MODE": "online"}, "online"),
        ({"WANDB_MODE": "run"}, "online"),
        ({"WANDB_MODE": "OFFLINE"}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "disabled"),
        ({"WANDB_DISABLED": "false", "WANDB_MODE": "online"}, "online"),
        ({"WANDB_DISABLED": ""}, "offline"),
    ],
)
def test_the_environment_s_mode_counts_where_the_configuration_names_none(env, mode):
    assert (make(env).mode, make(env).overruled) == (mode, ())


@pytest.mark.parametrize("said", ["shared", "on", "None"])
def test_a_mode_that_is_none_is_told_and_trains_on(said):
    choice = make({"WANDB_MODE": said})
    assert choice.mode == ("online" if said == "shared" else "offline")
    assert len(choice.overruled) == 1 and f"WANDB_MODE={said.lower()}" in choice.overruled[0]


def test_nothing_is_passed_that_the_environment_says():
    choice = make({"WANDB_PROJECT": "p", "WANDB_ENTITY": "e", "WANDB_NAME": "n", "WANDB_DIR": "/d", "WANDB_TAGS": "t"})
    assert (choice.project, choice.entity, choice.name, choice.dir) == (None, None, None, None)
    assert choice.overruled == ()


def test_what_the_configuration_overrules_is_told_with_the_key_that_does():
    env = {"WANDB_MODE": "online", "WANDB_PROJECT": "p", "WANDB_ENTITY": "e", "WANDB_RUN_ID": "x"}
    choice = make(env, mode="offline", project="q", entity="f")
    assert (choice.mode, choice.project, choice.entity) == ("offline", "q", "f")
    assert choice.overruled == (
        "WANDB_MODE=online (wandb.mode=offline)",
        "WANDB_RUN_ID (a run keeps one id over all its attempts)",
        "WANDB_PROJECT=p (wandb.project=q)",
        "WANDB_ENTITY=e (wandb.entity=f)",
    )


def test_what_agrees_is_not_told():
    env = {"WANDB_MODE": "offline", "WANDB_PROJECT": "q"}
    assert make(env, mode="offline", project="q").overruled == ()


def test_a_run_that_is_disabled_against_the_environment_is_told_so():
    config = RunConfig(wandb=WandbConfig(mode="disabled"))
    assert not choose(config, {"WANDB_RUN_ID": "x"}, folder="").overruled
    choice = choose(config, {"WANDB_MODE": "online"}, folder="")
    assert choice.mode == "disabled"
    assert choice.overruled == ("WANDB_MODE=online (wandb.mode=disabled)",)


names = st.sampled_from(["WANDB_MODE", "WANDB_DISABLED", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_NAME", "WANDB_DIR"])


@given(st.dictionaries(names, st.text(max_size=9)), st.sampled_from(["auto", "offline", "online", "disabled"]))
def test_every_mode_that_the_configuration_names_is_the_one_taken(env, mode):
    choice = make(env, mode=mode)
    assert choice.mode in ("offline", "online", "disabled")
    assert mode in ("auto", choice.mode)
