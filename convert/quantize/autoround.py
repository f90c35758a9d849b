import functools
import jax, jax.numpy as jnp, numpy as np, optax
from jaxgen.quant.int4 import Int4, pack, rounded, SCALE_DTYPE, unpack
from .layers import Block, linears


def straight(f, x):
    return x + jax.lax.stop_gradient(f(x) - x)


def codes_and_scale(start, learned):
    weight, scale = start
    offsets, factors = learned
    s = straight(rounded, scale * factors)
    inv = jnp.where(s == 0, 0, 1 / jnp.where(s == 0, 1, s))
    g = weight.reshape(*scale.shape, -1) * inv[..., None] + offsets
    return jnp.clip(straight(jnp.round, g), -8, 7), s


def dense(start, learned):
    codes, s = codes_and_scale(start, learned)
    return (codes * s[..., None]).reshape(start[0].shape)


def to_int4(start, learned):
    codes, s = codes_and_scale(start, learned)
    return Int4(pack(codes.astype(jnp.int8).reshape(start[0].shape)), s.astype(SCALE_DTYPE))


class AutoRound:
    def __init__(self, block: Block, iterations=200, batch=8, lr=None, lrs=None, clip=(0.5, 1.5), seed=0, checks=8):
        self.block, self.iterations, self.batch, self.clip, self.checks = block, iterations, batch, clip, checks
        lr = lr or 1 / iterations
        lrs = lrs or lr
        sched = lambda l: optax.sign_sgd(optax.linear_schedule(l, 0, iterations))
        self.opt = optax.multi_transform({"v": sched(lr), "s": sched(lrs)}, lambda p: {n: ("v", "s") for n in p})
        self.step = jax.jit(self._step)
        self.loss = jax.jit(self._loss)
        self.seed = seed

    def _loss(self, learned, starts, weights, x, y):
        w = weights | {n: dense(starts[n], learned[n]) for n in starts}
        return jnp.mean(jnp.square(self.block.output(w, x) - y))

    def _step(self, learned, state, starts, weights, x, y):
        loss, grad = jax.value_and_grad(self._loss)(learned, starts, weights, x, y)
        upd, state = self.opt.update(grad, state)
        new = optax.apply_updates(learned, upd)
        return {n: (jnp.clip(v, -0.5, 0.5), jnp.clip(f, *self.clip)) for n, (v, f) in new.items()}, state, loss

    def whole(self, learned, starts, weights, X, Y):
        return float(
            np.mean([self.loss(learned, starts, weights, X[i : i + 16], Y[i : i + 16]) for i in range(0, len(X), 16)])
        )

    def run(self, weights, starts, X, Y, log=None):
        learned = {
            n: (jnp.zeros((*s.shape, w.shape[1] // s.shape[1])), jnp.ones(s.shape)) for n, (w, s) in starts.items()
        }
        state = self.opt.init(learned)
        rng = np.random.default_rng(self.seed)
        best = (self.whole(learned, starts, weights, X, Y), learned)
        hist = [best[0]]
        for i in range(self.iterations):
            rows = rng.choice(len(X), self.batch, replace=False)
            learned, state, loss = self.step(learned, state, starts, weights, X[rows], Y[rows])
            if (i + 1) % (self.iterations // self.checks) == 0:
                l = self.whole(learned, starts, weights, X, Y)
                hist.append(l)
                if l < best[0]:
                    best = (l, learned)
        self.hist = hist
        return {n: to_int4(starts[n], best[1][n]) for n in starts}
