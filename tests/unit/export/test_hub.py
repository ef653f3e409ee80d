"""Adapters on a stand-in for the Hugging Face hub."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from ptp_lightning import ParallelTokenPredictor
from ptp_lightning.export.checkpoint import load_network, save_network
from ptp_lightning.export.hub import hub_id, warn_of_local_base
from ptp_lightning.export.model_folder import save_with_base_model
from ptp_lightning.export.packaged_adapters import packaged_adapter_folder
from ptp_lightning.export.stored_predictor import EXPORTED_FILES, read_predictor
from ptp_lightning.models import PredictorNetwork
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.hub_stand_in import TOKEN, HubStandIn, running_hub, use_hub
from tests.helpers.stored_predictors import trained
from tests.helpers.tiny_models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:the base model is .* of this machine")

TRAINING = {"steps": 400, "prefix_counts": [0, 3, 2, 2, 1]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(vocab_size=257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def network(base: Path) -> PredictorNetwork:
    return trained(base)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def same_weights(one: PredictorNetwork, other: PredictorNetwork) -> bool:
    ours, theirs = one.trainable_state(), other.trainable_state()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_pushed_opens(hub: HubStandIn, network: PredictorNetwork) -> None:
    address = ParallelTokenPredictor(network, TRAINING).push_to_hub("user/mine", token=TOKEN, license="apache-2.0")
    assert address.startswith(f"{hub.address}/user/mine/commit/")
    (files,) = hub.repos["user/mine"].values()
    assert set(files) == set(EXPORTED_FILES)
    opened = ParallelTokenPredictor.from_pretrained("user/mine")
    assert same_weights(opened.network, network)
    assert opened.training == TRAINING


def test_a_base_model_that_others_do_not_have(
    hub: HubStandIn, network: PredictorNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, here = ParallelTokenPredictor(network), network.config.backbone.path
    with pytest.warns(UserWarning, match=f"the base model is {here} of this machine.*--base USER/MODEL") as caught:
        predictor.push_to_hub("user/mine", token=TOKEN)
    assert [warning.filename for warning in caught] == [__file__]
    for known in ("user/base", "smollm2", "embedded"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_local_base(known)


def test_its_card(hub: HubStandIn, network: PredictorNetwork) -> None:
    ParallelTokenPredictor(network, TRAINING).push_to_hub("user/mine", token=TOKEN, license="apache-2.0")
    (files,) = hub.repos["user/mine"].values()
    card = ModelCard(files["README.md"].decode())
    card.validate()
    assert card.data.license == "apache-2.0"
    assert card.data.get("base_model") is None  # a folder of this machine
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["parallel-token-prediction", "lora"]
    assert card.data.metrics == ["correct_tokens"]
    (result,) = card.data.eval_results or []
    assert (result.metric_type, result.metric_value) == ("correct_tokens", (3 + 4 + 6 + 4) / 8)
    assert 'from_pretrained("user/mine")' in card.text and '--ckpt_path "user/mine"' in card.text
    assert "| Correct tokens | 2.12 of a window of 4 (mean of the last validation before the checkpoint) |" in card.text


def test_cards_of_whole_folders_and_of_the_package(
    network: PredictorNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_with_base_model(network, tmp_path / "whole", training=TRAINING, license="mit")
    assert "Writing model shards" not in capsys.readouterr().err  # a progress bar, also in logs
    data = ModelCard.load(tmp_path / "whole" / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "text-generation")
    for name, base_model in (("code", None), ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")):
        data = ModelCard.load(packaged_adapter_folder(name) / "README.md").data
        assert (data.license, data.get("base_model")) == ("apache-2.0", base_model)
        assert data.eval_results


def test_an_earlier_commit(hub: HubStandIn, base: Path, network: PredictorNetwork, tmp_path: Path) -> None:
    save_network(network, tmp_path / "export")
    first = hub.add_folder("user/mine", tmp_path / "export")
    settings = json.loads((tmp_path / "export" / "predictor.json").read_text())
    settings["training"] = {"steps": 7}
    hub.commit("user/mine", {"predictor.json": json.dumps(settings).encode()})
    assert read_predictor("user/mine").training == {"steps": 7}
    assert read_predictor(f"user/mine@{first}").training == {}
    with pytest.raises(FileNotFoundError, match="a repository at http://127.0.0.1:.* without this revision"):
        read_predictor("user/mine@v9")


def test_with_its_base_model(hub: HubStandIn, network: PredictorNetwork, tmp_path: Path) -> None:
    save_with_base_model(network, tmp_path / "whole")
    commit = hub.add_folder("user/whole", tmp_path / "whole")
    opened = load_network("user/whole")
    assert same_weights(opened, network)
    assert (opened.config.backbone.path, opened.config.backbone.revision) == ("user/whole", commit)
    assert not any("custom_generate" in request for request in hub.requests)  # code of a stranger


def test_transformers_opens_a_repository_with_its_base_model(
    hub: HubStandIn, network: PredictorNetwork, tmp_path: Path
) -> None:
    save_with_base_model(network, tmp_path / "whole")
    hub.add_folder("user/whole", tmp_path / "whole")
    plain, parallel = (
        AutoModelForCausalLM.from_pretrained("user/whole", trust_remote_code=trusted) for trusted in (False, True)
    )
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [model.generate(torch.tensor([[50, 51, 52]]), **options).tolist() for model in (plain, parallel)]
    assert texts[0] == texts[1]
    assert any(request.endswith("custom_generate/generate.py") for request in hub.requests)
    assert any(request.endswith("predictor/adapter_model.safetensors") for request in hub.requests)


def test_only_data_is_downloaded(hub: HubStandIn, network: PredictorNetwork, tmp_path: Path) -> None:
    """And no class that it names is imported."""
    save_network(network, tmp_path / "export")
    settings = json.loads((tmp_path / "export" / "predictor.json").read_text())
    settings["config"]["features"]["class_path"] = "evil.Features"
    hub.add_folder("user/evil", tmp_path / "export")
    hub.commit("user/evil", {"predictor.json": json.dumps(settings).encode(), "evil.py": b"1 / 0", "last.ckpt": b"."})
    with pytest.raises(ValueError, match=r"expected classes of ptp_lightning\.models, found 'evil\.Features'"):
        ParallelTokenPredictor.from_pretrained("user/evil")
    assert not [request for request in hub.requests if request.endswith((".py", ".ckpt"))]


def test_private_repositories(hub: HubStandIn, network: PredictorNetwork) -> None:
    ParallelTokenPredictor(network).push_to_hub("user/secret", token=TOKEN, private=True)
    assert hub.private == {"user/secret"}
    with pytest.raises(FileNotFoundError, match="no public repository at .* need `hf auth login`"):
        read_predictor("user/secret")


def test_a_repository_without_a_predictor(hub: HubStandIn) -> None:
    hub.commit("user/other", {"pytorch_model.bin": b"."})
    with pytest.raises(FileNotFoundError, match="expected a predictor in http://127.*/user/other, found none of"):
        read_predictor("user/other")


def test_without_a_connection_the_cache_serves(
    hub: HubStandIn, network: PredictorNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_network(network, tmp_path / "export")
    hub.add_folder("user/mine", tmp_path / "export")
    first = read_predictor("user/mine")
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert read_predictor("user/mine").path == first.path
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read_predictor("user/mine").path == first.path


@pytest.mark.parametrize(("offline", "reason"), [(False, "cannot be reached"), (True, "HF_HUB_OFFLINE is set")])
def test_what_was_tried(
    offline: bool, reason: str, network: PredictorNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with pytest.raises(FileNotFoundError) as error:
        read_predictor("user/mine")
    message = str(error.value)
    assert "\n" not in message
    for part in ("repository of the hub at user/mine", "http://127.0.0.1:9", reason, "cache", "set ckpt_path"):
        assert part in message
    with pytest.raises(ConnectionError, match=f"to the hub as user/mine, found .*{reason}.*: set repo_id or token"):
        ParallelTokenPredictor(network).push_to_hub("user/mine", token=TOKEN)


@pytest.mark.parametrize("name", ["mine", "a/b/c", "user/mine@v1", "../mine", "/mine"])
def test_only_ids_are_pushed_to(name: str, network: PredictorNetwork) -> None:
    with pytest.raises(ValueError, match="expected an id of the hub as in user/name, found .*: set repo_id"):
        ParallelTokenPredictor(network).push_to_hub(name)


def test_local_files_come_first(
    network: PredictorNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubStandIn
) -> None:
    save_network(network, tmp_path / "user" / "mine", training={"steps": 3})
    monkeypatch.chdir(tmp_path)
    assert hub_id("user/mine") is not None
    assert read_predictor("user/mine").training == {"steps": 3}
    assert hub.requests == []
