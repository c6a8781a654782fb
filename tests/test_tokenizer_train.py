"""Training the tokenizer: every term of the loss, who learns from which, and several devices."""

import dataclasses
import functools
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emu3_jax import checkpoint, divergence, mesh, metrics, optim, update
from emu3_jax import train as emu3_train
from tests import toy
from tokenizer import (
    convert,
    discriminator,
    exchange,
    losses,
    lpips,
    quantize,
    rows,
    train,
    vq,
)

TINY = vq.VQConfig(
    codebook_size=16, width=8, multipliers=(1,), res_blocks=1, attention_levels=(), norm_groups=4
)
PERCEPTUAL = losses.Perceptual(weight=0.1, network="stand-in")
ADVERSARIAL = losses.Adversarial(weight=0.5, layers=1, width=4)
LAST = "decoder.conv_out.kernel"


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    """A perceptual distance of one layer, which costs no time."""
    weights = {"convs": [{"kernel": 0.3 * frames(9, 3, 3, 3, 4), "bias": np.zeros(4, np.float32)}]}

    def distance(network, params, x_BHWC, y_BHWC):
        assert network == "stand-in"
        kernel_HWIO = params["convs"][0]["kernel"]
        difference_BHWC = jax.lax.conv_general_dilated(
            x_BHWC - y_BHWC, kernel_HWIO, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.square(difference_BHWC).sum(-1).mean((1, 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lpips, "load", lambda network, path="": weights)
        patch.setattr(lpips, "distance", distance)
        yield


def frames(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def both(seed, batch=2, size=8):
    """Rows of an image and a clip."""
    return {
        "image": frames(seed, batch, size, size, 3),
        "clip": frames(seed + 1, batch, 4, size, size, 3),
    }


def task(**fields):
    return train.TokenizerTask(TINY, **dict(dict(buffer_rows=256, codebook_init_step=-1), **fields))


def start(task):
    """Weights and variables whose codes lie among the vectors."""
    params, variables = jax.jit(task.init)(jax.random.key(0))
    return params | {"quantize.embedding": params["quantize.embedding"] / 2}, variables


@pytest.fixture(scope="module")
def plain():
    """The state of a tokenizer without a discriminator."""
    return start(task())


def graded(task, params, variables, batch):
    """(loss, variables, metrics, gradients)."""
    grad_fn = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, (variables, metrics)), grads = grad_fn(params, variables, batch, None)
    return loss, variables, metrics, grads


def rival_of(params):
    rival = {n.removeprefix(train.RIVAL): v for n, v in params.items() if n.startswith(train.RIVAL)}
    return discriminator.merge(1, 4, ADVERSARIAL.norm, rival)


def own_of(params):
    return {name: value for name, value in params.items() if not name.startswith(train.RIVAL)}


def close(got, want, rtol=1e-4):
    """Trees of arrays, each to within `rtol` of its largest number (or of 1% of the largest)."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    least = 1e-2 * max(np.abs(value).max() for value in jax.tree.leaves(want))
    for found, (path, value) in zip(jax.tree.leaves(got), jax.tree.leaves_with_path(want),
                                    strict=True):  # fmt: skip
        atol = rtol * max(np.abs(value).max(), least)
        np.testing.assert_allclose(found, value, rtol=0, atol=atol, err_msg=str(path))


def test_without_a_discriminator_the_loss_is_the_plain_one(plain):
    """Images, and clips, as the tokenizer itself takes them; here in training mode."""
    params, variables = plain

    def tokenizer_loss(x, into, back):
        model = vq.merge(TINY, params, variables["stats"])
        z_E = getattr(model, into)(x, train=True)
        q_E = model.quantize.lookup(model.quantize.nearest(z_E))
        y = getattr(model, back)(quantize.straight_through(z_E, q_E), train=True)
        commitment, codebook = quantize.losses(z_E, q_E)
        return jnp.square(x - y).mean() + commitment + 0.25 * codebook, vq.split(model)[1]

    for kind, name in (("video", "clip"), ("image", "image")):
        batch = {name: both(0)[name]}
        ways = functools.partial(tokenizer_loss, into=f"{kind}_latents", back=f"{kind}_pixels")
        want, stats = jax.jit(ways)(batch[name])
        loss, (after, metrics) = jax.jit(task().loss)(params, variables, batch, None)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
        close(after["stats"], stats, rtol=1e-6)
        assert not {"perceptual", "generator", "entropy"} & metrics.keys()


def test_an_image_beside_a_clip_is_a_clip_that_stands_still(plain):
    """So batch statistics are over both, and every frame counts alike."""
    params, variables = plain

    @functools.partial(jax.jit, static_argnums=1)
    def reconstruct(x_BFHWC, image):
        model = vq.merge(TINY, params, variables["stats"])
        y_BFHWC, _, _, codes_Nthw, _ = rows.reconstruct(model, x_BFHWC, image)
        return y_BFHWC, codes_Nthw, vq.split(model)[1]

    batch = both(0)
    x_BFHWC, image = rows.frames(batch)
    assert image and x_BFHWC.shape == (2, 5, 8, 8, 3)
    y_BFHWC, codes_Nthw, stats = reconstruct(x_BFHWC, image)
    still_BTHWC = np.repeat(batch["image"][:, None], 4, axis=1)
    clips_NTHWC = np.stack([still_BTHWC, batch["clip"]], axis=1).reshape(4, 4, 8, 8, 3)
    y_NTHWC, want_Nthw, want_stats = reconstruct(clips_NTHWC, False)
    np.testing.assert_array_equal(codes_Nthw, want_Nthw)
    np.testing.assert_allclose(y_BFHWC[:, 0], y_NTHWC[::2, 0], atol=1e-5)
    np.testing.assert_allclose(y_BFHWC[:, 1:], y_NTHWC[1::2], atol=1e-5)
    close(stats, want_stats, rtol=1e-5)
    _, (_, metrics) = jax.jit(task().loss)(params, variables, batch, None)
    np.testing.assert_allclose(metrics["l2"], np.square(y_BFHWC - x_BFHWC).mean(), rtol=1e-4)


def test_rows_are_bytes_or_floats():
    row = next(iter(toy.Pictures(frames=4).rows()))
    batch = {name: x[None] for name, x in row.items()}
    x_BFHWC, image = rows.frames(batch)
    as_floats = {name: x / np.float32(127.5) - 1 for name, x in batch.items()}
    np.testing.assert_allclose(x_BFHWC, rows.frames(as_floats)[0], atol=1e-6)
    assert image and x_BFHWC.shape == (1, 5, 8, 8, 3)
    alone, image = rows.frames({"clip": batch["clip"]})
    np.testing.assert_array_equal(alone, x_BFHWC[:, 1:])
    assert not image


def test_batches_that_do_not_go_together(plain):
    params, variables = plain
    batch = both(0) | {"image": frames(0, 2, 16, 16, 3)}
    message = "^a batch holds images of 16x16 pixels and clips of 8x8; give them one size"
    with pytest.raises(ValueError, match=message):
        task().loss(params, variables, batch, None)
    with pytest.raises(ValueError, match="^clips of 6 frames are no multiple of temporal_factor 4"):
        task().loss(params, variables, {"clip": frames(1, 2, 6, 8, 8, 3)}, None)


FULL = dict(perceptual=PERCEPTUAL, adversarial=dataclasses.replace(ADVERSARIAL, lecam=0.1))


@pytest.fixture(scope="module")
def judged():
    """A state in the middle of training, and a batch."""
    params, variables = start(task(**FULL))
    variables["logits"] = {"real": jnp.float32(0.4), "fake": jnp.float32(-0.3)}
    params[f"{train.RIVAL}conv_out.bias"] = jnp.array([0.2])
    return params, variables, both(0)


@pytest.fixture(scope="module")
def apart(judged):
    """(loss, gradient) of each term alone: those of the tokenizer and that of the discriminator."""
    params, variables, batch = judged
    x_BFHWC, image = rows.frames(batch)

    def reconstruct(own):
        model = vq.merge(TINY, own, variables["stats"])
        y_BFHWC, z_NthwE, q_NthwE, *_ = rows.reconstruct(model, x_BFHWC, image)
        return (*(x.reshape(-1, 8, 8, 3) for x in (x_BFHWC, y_BFHWC)), z_NthwE, q_NthwE)

    def likeness(own):
        x_BHWC, y_BHWC, *_ = reconstruct(own)
        distance_B = lpips.distance("stand-in", variables["perceptual"], x_BHWC, y_BHWC)
        return jnp.square(x_BHWC - y_BHWC).mean() + 0.1 * distance_B.mean()

    def quantizer(own):
        commitment, codebook = quantize.losses(*reconstruct(own)[2:])
        return commitment + 0.25 * codebook

    def judgement(own):
        return -rival_of(params)(reconstruct(own)[1]).mean()

    def rival_terms(rival):
        x_BHWC, y_BHWC, *_ = reconstruct(own_of(params))
        real_Bhw, fake_Bhw = rival_of(rival)(x_BHWC), rival_of(rival)(y_BHWC)
        hinge = (jnp.maximum(1 - real_Bhw, 0).mean() + jnp.maximum(1 + fake_Bhw, 0).mean()) / 2
        above_Bhw, below_Bhw = jnp.maximum(real_Bhw + 0.3, 0), jnp.maximum(0.4 - fake_Bhw, 0)
        return hinge + 0.1 * (jnp.square(above_Bhw).mean() + jnp.square(below_Bhw).mean())

    @jax.jit  # one program, of which XLA computes the common parts once
    def all_terms(own, rival):
        terms = [jax.value_and_grad(term)(own) for term in (likeness, quantizer, judgement)]
        return *terms, jax.value_and_grad(rival_terms)(rival)

    rival = {n: v for n, v in params.items() if n.startswith(train.RIVAL)}
    return all_terms(own_of(params), rival)


def test_each_side_learns_from_its_own_terms(judged, apart):
    params, variables, batch = judged
    likeness, quantizer, judgement, rival = apart
    own = jax.tree.map(lambda a, b, c: a + b + 0.5 * c, likeness, quantizer, judgement)
    loss, after, metrics, grads = graded(task(**FULL), params, variables, batch)
    np.testing.assert_allclose(loss, own[0] + rival[0], rtol=1e-5)
    close(grads, own[1] | rival[1])
    assert all(np.abs(value).max() > 1e-6 for value in rival[1].values())
    for kind, old in (("real", 0.4), ("fake", -0.3)):
        want = 0.999 * old + 0.001 * metrics[f"logits_{kind}"]
        np.testing.assert_allclose(after["logits"][kind], want, rtol=1e-5)
    for part, want in variables["perceptual"]["convs"][0].items():
        np.testing.assert_array_equal(after["perceptual"]["convs"][0][part], want)


def test_nothing_plays_before_the_start_and_the_weight_may_adapt(judged, apart):
    """An adaptive weight is the ratio of two gradients, here taken whole, at the last kernel."""
    params, variables, batch = judged
    likeness, quantizer, judgement, _ = (grads for _, grads in apart)
    want = np.linalg.norm(likeness[LAST]) / (np.linalg.norm(judgement[LAST]) + 1e-4)
    assert abs(want - 1) > 0.1
    late = dataclasses.replace(FULL["adversarial"], start=3, adaptive=True)
    late = task(**FULL | dict(adversarial=late))
    grad_fn = jax.jit(jax.grad(late.loss, has_aux=True))
    for updates, plays in ((2, False), (3, True)):
        now = variables | {"updates": jnp.int32(updates)}
        grads, (after, metrics) = grad_fn(params, now, batch, None)
        weight = 0.5 * want if plays else 0.0
        np.testing.assert_allclose(metrics["generator_weight"], weight, rtol=1e-4)
        close(own_of(grads), jax.tree.map(lambda a, b, c, weight=weight: a + b + weight * c,
                                          likeness, quantizer, judgement))  # fmt: skip
        rival = [np.abs(value).max() for n, value in grads.items() if n.startswith(train.RIVAL)]
        assert (max(rival) > 0) == plays
        assert (after["logits"]["real"] != variables["logits"]["real"]) == plays
    _, left = late.after_update(params, variables, jnp.int32(6), jax.random.key(0))
    assert left["updates"] == 7


@pytest.mark.slow
def test_the_tokenizer_learns_what_passes_for_real():
    """With nothing else to go by, and against a judge that stays as it is."""
    only = task(l2_weight=0.0, commitment_weight=0.0, codebook_weight=0.0, adversarial=ADVERSARIAL)
    optimizer = optax.adam(1e-3)

    @jax.jit
    def update(params, variables, moments):
        grads, (variables, metrics) = jax.grad(only.loss, has_aux=True)(
            params, variables, both(0), None
        )
        updates, moments = optimizer.update(own_of(grads), moments)
        params |= optax.apply_updates(own_of(params), updates)
        return params, variables, moments, metrics["generator"]

    params, variables = start(only)
    moments, generator = optimizer.init(own_of(params)), []
    for _ in range(8):
        params, variables, moments, said = update(params, variables, moments)
        generator.append(float(said))
    assert generator[-1] < generator[0] - 0.05


def test_the_gradient_penalty_is_over_each_pictures_own_gradient():
    adversarial = losses.Adversarial(weight=0.1, layers=1, width=4, norm="none", r1=10.0)
    params, averages = adversarial.init(jax.random.key(0))
    critic = discriminator.merge(1, 4, "none", params)
    x_BHWC, y_BHWC = frames(0, 3, 8, 8, 3), frames(1, 3, 8, 8, 3)
    squares = []
    gradient = jax.jit(jax.jacobian(lambda x_HWC: critic(x_HWC[None])[0]))
    for x_HWC in x_BHWC:
        squares.append(np.square(gradient(x_HWC).sum((0, 1))).sum())
    terms = jax.jit(lambda: adversarial.loss(params, averages, x_BHWC, y_BHWC, None, jnp.int32(0)))
    loss, _, values = terms()
    np.testing.assert_allclose(values["r1"], np.mean(squares), rtol=1e-5)
    want = 0.1 * values["generator"] + values["discriminator"] + 10 * values["r1"]
    np.testing.assert_allclose(loss, want, rtol=1e-6)


def test_entropy_is_that_of_all_choices(plain):
    z_BPE, codebook_KE = jnp.asarray(frames(0, 3, 5, 4)), jnp.asarray(frames(1, 7, 4))
    squares_BPK = np.square(z_BPE[:, :, None] - codebook_KE).sum(-1)
    choice_NK = np.exp(-squares_BPK / 0.2).reshape(15, 7)
    choice_NK /= choice_NK.sum(-1, keepdims=True)
    mean_K = choice_NK.mean(0)
    want = -(choice_NK * np.log(choice_NK)).sum(-1).mean() + (mean_K * np.log(mean_K)).sum()
    np.testing.assert_allclose(losses.entropy(z_BPE, codebook_KE, 0.2), want, rtol=1e-5)
    loss, (_, metrics) = jax.jit(task(entropy_weight=0.1).loss)(*plain, both(0), None)
    rest = metrics["l2"] + 1.25 * metrics["commitment"]
    np.testing.assert_allclose(loss, rest + 0.1 * metrics["entropy"], rtol=1e-5)
    assert -np.log(16) < metrics["entropy"] < 0


def test_gradients_are_clipped_apart(judged):
    """However loud the discriminator, the tokenizer moves as far as before."""
    full, (params, *_) = task(**FULL), judged
    optimizer = optim.AdamW(rate=1.0, warmup=0, weight_decay=0.0, clip=1.0, eps=1.0)
    optimizer = optimizer.make(10, full.decays(), full.groups())
    grads = jax.tree.map(jnp.ones_like, params)
    loud = {n: 1e3 * v if n.startswith(train.RIVAL) else v for n, v in grads.items()}
    moves = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(params), params)[0])
    close(moves(loud), moves(grads), rtol=1e-6)
    assert task().groups() is None


RUN = task(**FULL | dict(codebook_init_step=2, restart_every=1, restart_until=100))


@pytest.fixture(scope="module")
def start_of_run():
    """The state before the first update."""
    return jax.tree.map(np.asarray, jax.jit(RUN.init)(jax.random.key(0)))


def updates(start_of_run, devices, count=3):
    """(weights, variables, metrics) after each of the first updates on so many devices.

    The second places codes, the third restarts some. Rounding, which hangs on the machine, grows
    sevenfold with each update in the gradients' norm: 1.5e-5 in the third, 1e-4 in a fourth.
    """
    device_mesh = mesh.Mesh(data=devices).make(jax.devices()[:devices], RUN.axis_type)
    optimizer, history = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.01)), []
    with jax.set_mesh(device_mesh):
        params, variables = jax.device_put(start_of_run, mesh.sharding(device_mesh, ""))
        state = dict(params=params, variables=variables, optimizer=optimizer.init(params),
                     guard=divergence.init(divergence.FINITE))  # fmt: skip
        step_fn = jax.jit(functools.partial(update.train_step, RUN, optimizer, 0))
        for step in range(count):
            batch = jax.device_put(both(step, 8), mesh.sharding(device_mesh, "B"))
            state, metrics = step_fn(state, batch, step)
            history.append(jax.tree.map(np.asarray, (state["params"], state["variables"], metrics)))
    return history


@pytest.fixture(scope="module")
def alone(start_of_run):
    return updates(start_of_run, 1)


@pytest.mark.parametrize("devices", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8])
def test_rows_over_devices_train_the_same_tokenizer(start_of_run, alone, devices):
    """Loss, gradient norm, batch statistics, ring of vectors, hits, placed and restarted codes."""
    history = updates(start_of_run, devices)
    for got, want in zip(history, alone, strict=True):
        for found, wanted in zip(got, want, strict=True):
            close(found, wanted)
        np.testing.assert_allclose(got[2]["loss"], want[2]["loss"], rtol=1e-5)
        np.testing.assert_array_equal(got[1]["hits_K"], want[1]["hits_K"])
    moved = [(params["quantize.embedding"] != old["quantize.embedding"]).any(-1)
             for (old, *_), (params, *_) in itertools.pairwise(history)]  # fmt: skip
    assert moved[0].all()  # placed after the second update


def job(run_dir, **fields):
    fields = dict(dict(task=RUN, data=toy.Pictures(), steps=4, batch=8, ema=0.9), **fields)
    optimizer = optim.AdamW(rate=3e-3, warmup=2, weight_decay=0.0, clip=1.0)
    return emu3_train.Train(
        run_dir=str(run_dir), optimizer=optimizer, log_every=1, save_every=2, **fields
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run of four updates over eight devices."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    job(run_dir).run()
    return run_dir


def state_of(run_dir, step):
    device_mesh = mesh.Mesh().make(axis_type=RUN.axis_type)
    with jax.set_mesh(device_mesh), checkpoint.Checkpoints(str(run_dir)) as saved:
        return saved.restore(step, job(run_dir).abstract_state(device_mesh))


@pytest.mark.slow
def test_a_run_goes_on_exactly(finished, tmp_path):
    """With a discriminator, averages of its logits, codes placed and restarted in between."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    job(tmp_path / "run").run()
    want, got = (state_of(run_dir, 4) for run_dir in (finished, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got["variables"]["updates"] == 4 and got["variables"]["logits"]["real"] != 0
    lines = metrics.read(str(finished))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    terms = {"l2", "perceptual", "commitment", "generator", "discriminator", "lecam"}
    assert terms <= lines[-1].keys()


def test_what_others_load_is_the_tokenizer_alone(finished):
    tokenizer = convert.load(finished)
    params, stats = vq.split(tokenizer)
    assert params.keys() == vq.shapes(TINY)[0].keys()
    state = state_of(finished, 4)
    for name, value in params.items():  # the moving average
        np.testing.assert_array_equal(value, state["ema"][name])
    np.testing.assert_array_equal(
        stats["encoder.time_res_stack.0.norm1.mean"],
        state["variables"]["stats"]["encoder.time_res_stack.0.norm1.mean"],
    )
    assert tokenizer.encode(both(0)["image"]).shape == (2, 8, 8)


def started(task, path):
    """(a random state, the state that training starts from)."""
    with jax.set_mesh(mesh.Mesh().make(axis_type=task.axis_type)):
        random = job("unused", task=task).make()(0)
        return random, random | update.initial_weights(task, str(path), random)


@pytest.mark.parametrize("layers, comes_along", [(1, True), (2, False), (0, False)])
def test_training_starts_from_any_run(finished, layers, comes_along):
    """With the same discriminator, with another one, or without; hits and the ring start anew."""
    weight = 0.5 if layers else 0.0
    adversarial = dataclasses.replace(ADVERSARIAL, layers=layers, weight=weight)
    random, state = started(task(adversarial=adversarial), finished)
    other = state_of(finished, 4)
    for name, value in state["params"].items():
        if name in own_of(state["params"]) or comes_along:
            np.testing.assert_array_equal(value, other["ema"][name])
        else:
            np.testing.assert_array_equal(value, random["params"][name])
    assert len(state["params"]) > len(own_of(state["params"])) or not layers
    jax.tree.map(
        np.testing.assert_array_equal, state["variables"]["stats"], other["variables"]["stats"]
    )
    assert state["variables"]["seen"] == 0 and state["variables"]["updates"] == 0
    jax.tree.map(np.testing.assert_array_equal, state["ema"], state["params"])


WIDE = dataclasses.replace(TINY, width=32, norm_groups=32)


@pytest.fixture(scope="module")
def published():
    """A tokenizer that the published layouts can hold."""
    params, stats = vq.init(WIDE, jax.random.key(5))
    return vq.merge(WIDE, params, {name: value + 1 for name, value in stats.items()})


@pytest.mark.parametrize("layout", ["official", "hf", "emu3_jax"])
def test_training_starts_from_a_published_tokenizer(published, layout, tmp_path):
    exchange.save_vision(published, str(tmp_path / layout), layout)
    wide = train.TokenizerTask(WIDE, codebook_init_step=-1, buffer_rows=256, **FULL)
    random, state = started(wide, tmp_path / layout)
    params, stats = vq.split(published)
    jax.tree.map(np.testing.assert_array_equal, own_of(state["params"]), params)
    jax.tree.map(np.testing.assert_array_equal, state["variables"]["stats"], stats)
    assert jax.tree.structure(state) == jax.tree.structure(random)


def test_a_start_that_is_refused(finished):
    with pytest.raises(ValueError) as error:
        started(task(codebook_init_step=16), finished)
    assert str(error.value) == (
        f"initial={finished} with codebook_init_step 16: its codes would be replaced; "
        "set --config.task.codebook_init_step=-1"
    )
    with pytest.raises(ValueError) as error:
        started(train.TokenizerTask(WIDE, codebook_init_step=-1), finished)
    assert str(error.value) == f"initial={finished} has width = 8, now 32; make task.config fit it"
