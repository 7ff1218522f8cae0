"""Students of timm are called after their networks, so that several of them fit into one run."""

from __future__ import annotations

import pytest

from seed_exp.config.compose import compose
from seed_exp.config.schema import StudentConfig
from seed_exp.config.sweep import jobs
from seed_exp.config.timm_students import named_by_network


def students(*words: str) -> dict[str, str | None]:
    """Network in timm of each student of `distill`, by name."""
    config = compose("distill", ["data.root=/x", *words])
    return {name: student.name or student.network for name, student in config.students.items()}


def test_a_list_gives_several_networks_of_timm_beside_ours() -> None:
    assert students("student=[resnet18,timm/convnext_atto,timm/vit_tiny_patch16_224]") == {
        "resnet18": "resnet18",
        "convnext_atto": "convnext_atto",
        "vit_tiny_patch16_224": "vit_tiny_patch16_224",
    }
    assert jobs("distill", ["student=timm/convnext_atto,timm/levit_128s"]) == [
        ["student=timm/convnext_atto"],
        ["student=timm/levit_128s"],
    ]


def test_each_of_them_has_its_own_options_under_its_own_name() -> None:
    config = compose(
        "distill",
        [
            "data.root=/x",
            "student=[timm/convnext_atto,timm/vit_tiny_patch16_224.augreg_in21k]",
            "students.convnext_atto.epochs=3",
            "students.vit_tiny_patch16_224_augreg_in21k.hidden_dim=64",
        ],
    )
    assert config.students["convnext_atto"].epochs == 3
    assert config.students["convnext_atto"].hidden_dim is None
    assert config.students["vit_tiny_patch16_224_augreg_in21k"].epochs is None
    assert config.students["vit_tiny_patch16_224_augreg_in21k"].hidden_dim == 64


@pytest.mark.parametrize(
    ("network", "name"),
    [
        ("convnext_atto", "convnext_atto"),
        ("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224_augreg_in21k"),
        ("hf-hub:timm/levit_128s", "hf_hub_timm_levit_128s"),
        ("efficientnet_b0", "timm_efficientnet_b0"),
    ],
)
def test_both_spellings_give_the_same_student(network: str, name: str) -> None:
    choice = compose("distill", ["data.root=/x", f"student=timm/{network}"])
    option = compose("distill", ["data.root=/x", "student=timm", f"students.timm.name={network}"])
    assert choice == option
    assert list(choice.students) == [name]


def test_a_network_of_ours_and_timms_of_the_same_name_are_two_students() -> None:
    found = compose("pretrain", ["data.root=/x", "student=[efficientnet_b0,timm/efficientnet_b0]"])
    assert {name: student.network for name, student in found.students.items()} == {
        "efficientnet_b0": "efficientnet_b0",
        "timm_efficientnet_b0": "timm",
    }


def test_two_students_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two students are called levit_128s: "):
        students("student=[timm,timm/levit_128s]", "students.timm.name=levit_128s")


def test_a_name_that_the_user_chose_stays() -> None:
    mine = {"mine": StudentConfig("timm", name="levit_128s")}
    assert named_by_network(mine, []) == mine


@pytest.mark.parametrize("network", ["convnext_atto", "efficientvit_b0", "fastvit_t8", "resnet10t"])
def test_an_option_that_is_timms_network_of_that_name_is_the_same_student(network: str) -> None:
    """Runs from before there was the option have this name, and go on."""
    by_name, by_option = (
        compose("distill", ["data.root=/x", f"student={spelling}"])
        for spelling in (f"timm/{network}", network)
    )
    assert by_name == by_option
    assert list(by_name.students) == [network]


@pytest.mark.parametrize(
    "words",
    [
        ["students.convnext_atto.args={drop_path_rate: 0.1, use_grn: true}"],
        [f"students.convnext_atto.args.{one}" for one in ("drop_path_rate=0.1", "use_grn=true")],
        [f"++students.convnext_atto.args.{one}" for one in ("drop_path_rate=0.1", "use_grn=true")],
    ],
)
def test_args_need_no_plus_and_their_values_keep_their_types(words: list[str]) -> None:
    config = compose("distill", ["data.root=/x", "student=timm/convnext_atto", *words])
    assert config.students["convnext_atto"].args == {"drop_path_rate": 0.1, "use_grn": True}


def test_args_are_added_to_those_of_an_option_file() -> None:
    words = ["data.root=/x", "student=vit_tiny", "students.vit_tiny.args={drop_path_rate: 0.1}"]
    found = compose("distill", words).students["vit_tiny"].args
    assert found == {"dynamic_img_pad": True, "drop_path_rate": 0.1}
    assert jobs("distill", [*words[:2], "students.vit_tiny.args.drop_path_rate=0,0.1"]) == [
        [*words[:2], f"++students.vit_tiny.args.drop_path_rate={rate}"] for rate in ("0", "0.1")
    ]


@pytest.mark.parametrize("group", ["student", "teacher"])
def test_a_network_of_the_users_must_be_named(group: str) -> None:
    option = {"student": "students.custom.network", "teacher": "teacher.network"}[group]
    with pytest.raises(ValueError, match=f"missing option {option}: add {option}=VALUE"):
        compose("distill", ["data.root=/x", f"{group}=custom"])
    config = compose("distill", ["data.root=/x", f"{group}=custom", f"{option}=my_nets.nets:build"])
    owner = config.students["custom"] if group == "student" else config.teacher
    assert owner.network == "my_nets.nets:build"


@pytest.mark.parametrize("command", ["pretrain", "bench bench=fleet"])
def test_every_command_that_trains_knows_them(command: str) -> None:
    name, *words = command.split()
    config = compose(name, [*words, "data.root=/x", "student=[timm/levit_128s,vit_tiny]"])
    assert list(config.students) == ["levit_128s", "vit_tiny"]
