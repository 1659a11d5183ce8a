"""Which task a checkpoint is taken for: by its architecture's name, what loads it, and what it reads."""

import pytest
from transformers import BertConfig, CLIPConfig, GPT2Config, MarianConfig, ViTConfig

from distill.errors import TeacherError
from distill.ledger import Ledger
from distill.progress import SILENT
from distill.recipe import Recipe
from distill.run import Run
from distill.tasks import find_task


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("RobertaForSequenceClassification", "text-classification"),
        ("DebertaV2ForTokenClassification", "token-classification"),
        ("DistilBertForQuestionAnswering", "question-answering"),
        ("MPNetModel", "sentence-embedding"),
        ("ModernBertForMaskedLM", "masked-lm"),
        ("LlamaForCausalLM", "causal-lm"),
        ("XLNetLMHeadModel", "causal-lm"),
        ("MBartForConditionalGeneration", "seq2seq"),
        ("ViTForImageClassification", "image-classification"),
    ],
)
def test_what_a_task_can_do_is_taken_for_it(architecture, task):
    assert find_task("auto", [architecture]).name == task


@pytest.mark.parametrize(
    "architecture",
    [
        "SiglipModel",  # an image beside the text
        "ViTModel",  # an image
        "RegNetModel",  # an image, though transformers leaves its modality at text
        "CLIPVisionModel",
        "T5EncoderModel",  # no auto class of ours loads it
        "BartModel",  # its last hidden states are the decoder's
        "SpeechEncoderDecoderModel",
        "WhisperForConditionalGeneration",  # sound
        "BlipForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "VoxtralForConditionalGeneration",  # text and sound, in the same auto class as T5
        "XLMWithLMHeadModel",  # guesses masked tokens or goes on from left to right: the name does not say
        "NobodysModel",
    ],
)
def test_what_no_task_can_do_is_refused(architecture):
    with pytest.raises(TeacherError, match=rf"\['{architecture}'\] belongs to no known task"):
        find_task("auto", [architecture])


@pytest.mark.parametrize(
    ("config", "pair", "line"),
    [
        (BertConfig(architectures=["BertForSequenceClassification"]), "", "text-classification (the teacher is a Bert"),
        (BertConfig(architectures=["BertForSequenceClassification"], num_labels=1), "", "regression (the teacher is a"),
        (
            BertConfig(architectures=["BertForSequenceClassification"], problem_type="multi_label_classification"),
            "",
            "multi-label (the teacher is a BertForSequenceClassification for multi_label_classification)",
        ),
        (BertConfig(architectures=["BertForTokenClassification"], num_labels=1), "", "token-classification (the te"),
        (BertConfig(architectures=["BertForQuestionAnswering"]), "context", "question-answering (the teacher is a B"),
        (GPT2Config(architectures=["GPT2LMHeadModel"], num_labels=1), "", "causal-lm (the teacher is a GPT2LMHead"),
        (MarianConfig(architectures=["MarianMTModel"]), "", "seq2seq (the teacher is a MarianMTModel)"),
        (ViTConfig(architectures=["ViTForImageClassification"]), "", "image-classification (the teacher is a ViTFor"),
        (CLIPConfig(architectures=["CLIPModel"]), "caption", "image-text (the teacher is a CLIPModel)"),
    ],
)
def test_a_run_says_which_task_it_takes_and_why(config, pair, line, tmp_path, monkeypatch):
    config.save_pretrained(tmp_path / "teacher")
    said = []
    monkeypatch.setattr(SILENT, "say", said.append, raising=False)
    recipe = Recipe.parse(
        {
            "output": str(tmp_path / "run"),
            "teacher": {"checkpoint": str(tmp_path / "teacher")},
            "data": {"train": "none.csv", "text_pair": pair},
        }
    )
    assert Run(recipe, Ledger(tmp_path / "state"), SILENT).task.name == line.split()[0]
    (told,) = said
    assert told.startswith(f"task: {line}")
