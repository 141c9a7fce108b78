"""Adam and its family written the obvious way, in float64."""

import torch

LR, EPS = 1e-2, 1e-8


class Reference:
    """Dense projector, float64, one formula per optimizer; shares no code with
    dmr or torch.optim.
    """

    def __init__(
        self,
        W,
        P,
        routing,
        alpha,
        kind,
        betas,
        weight_decay=0.0,
        maximize=False,
        lr=LR,
    ):
        self.W, self.P, self.routing, self.alpha, self.kind = (
            W.clone(),
            P,
            routing,
            alpha,
            kind,
        )
        self.b1, self.b2 = betas
        self.wd, self.sign, self.lr = (
            weight_decay,
            -1.0 if maximize else 1.0,
            lr,
        )
        self.m, self.v, self.vmax, self.t = (
            torch.zeros_like(W),
            torch.zeros_like(W),
            torch.zeros_like(W),
            0,
        )

    def step(self, g):
        g_tilde = g - self.alpha * g @ self.P
        to_m = g_tilde if self.routing in ("shared", "decoupled") else g
        to_v = g_tilde if self.routing in ("shared", "denominator") else g
        to_m, to_v = self.sign * to_m, self.sign * to_v
        if self.kind == "adamw":
            self.W = self.W * (1 - self.lr * self.wd)
        else:
            to_m, to_v = to_m + self.wd * self.W, to_v + self.wd * self.W
        self.t += 1
        t, b1, b2 = self.t, self.b1, self.b2
        self.m = b1 * self.m + (1 - b1) * to_m
        m_hat = self.m / (1 - b1**t)
        if self.kind == "adamax":
            self.v = torch.maximum(b2 * self.v, to_v.abs() + EPS)
            u = m_hat / self.v
        else:
            self.v = b2 * self.v + (1 - b2) * to_v**2
            self.vmax = torch.maximum(self.vmax, self.v)
            v = self.vmax if self.kind == "amsgrad" else self.v
            u = m_hat / ((v / (1 - b2**t)).sqrt() + EPS)
        if self.kind == "radam":
            rho_inf = 2 / (1 - b2) - 1
            rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
            if rho > 5:
                r = (
                    (rho - 4)
                    * (rho - 2)
                    * rho_inf
                    / ((rho_inf - 4) * (rho_inf - 2) * rho)
                ) ** 0.5
                u = m_hat * r * (1 - b2**t) ** 0.5 / (self.v.sqrt() + EPS)
            else:
                u = m_hat
        if self.routing == "displacement":
            u = u - self.alpha * u @ self.P
        self.u = u
        self.W = self.W - self.lr * u
