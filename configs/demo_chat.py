"""The demo's decoder learns to answer questions about pictures, and is asked about new ones.

    python -m emu3_jax.launch --config=configs/demo_chat.py            all stages, after make demo
    python -m emu3_jax.launch --config=configs/demo_chat.py:decoder    one stage: questions, store,
        decoder, answer, evaluate or report

Hardware: any CPU. Time: see README. Expected result: runs/demo_chat/report.html and
evaluation.json, in which the share of right answers is far above chance for three of four kinds
of question, also for pictures that the model has never seen. Fields are changed as in
--config.decoder.steps=500.
"""

import os

from configs import demo
from data_pipelines.documents import Layout, Weights
from data_pipelines.encode import Encode
from data_pipelines.mixture import Component, Mixture
from data_pipelines.sources import Images
from demo.answers import Answer, Evaluate
from demo.chat_report import ChatDemo, ChatReport
from demo.questions import Questions
from emu3_jax.optim import AdamW
from emu3_jax.train import Train
from inference.artist import Model


def build(run_dir: str, start: str, steps: int) -> ChatDemo:
    """The stages in one run directory; `start` is what the demo of drawing left."""
    drawing = demo.build(start, ("people",), 200, tokenizer_steps=1, decoder_steps=1)
    images, vocab = drawing.images.directory, drawing.vocabulary.path
    questions, store = f"{run_dir}/questions", f"{run_dir}/store"
    asked, answered = f"{questions}/asked.json", f"{run_dir}/answered.json"
    return ChatDemo(
        run_dir=run_dir,
        questions=Questions(images=images, directory=questions),
        store=Encode(
            source=Images(images, os.path.relpath(f"{questions}/train.jsonl", images)),
            conversation="messages", tokenizer=f"{start}/tokenizer", vocab=vocab,
            codes=demo.CODES, directory=store, min_pixels=32 * 32, max_pixels=32 * 32,
            factor=drawing.store.factor, licence="CC BY-SA 4.0 (OpenMoji)",
        ),  # fmt: skip
        decoder=Train(
            task=drawing.decoder.task,
            data=Mixture(
                components=(Component(store, Layout("chat", weights=Weights.understanding())),),
                vocab=vocab, codes=demo.CODES, length=448,
            ),
            run_dir=f"{run_dir}/decoder",
            initial=f"{start}/decoder",
            steps=steps,
            batch=8,
            save_every=100,
            optimizer=AdamW(rate=1e-3, warmup=30, weight_decay=0.1, clip=1.0),
        ),
        answer=Answer(
            Model(f"{start}/tokenizer", f"{run_dir}/decoder", vocab), images, asked, answered
        ),
        evaluate=Evaluate(asked, answered, f"{run_dir}/evaluation.json"),
        report=ChatReport(run_dir, images),
    )  # fmt: skip


def get_config(stage: str = ""):
    """The demo of answers, after make demo."""
    return build("runs/demo_chat", "runs/demo", steps=240).stage(stage)
