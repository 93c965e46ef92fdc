"""SOAP and SOAP-Muon of one matrix [inputs,outputs] in NumPy float64.

They share no code with jaxtrain. SOAP is written from Vyas et al. 2024, algorithm 3, and from
nikhilvyas/SOAP, soap.py: unlike ours, it stores the momentum rotated, and carries it along whenever
a basis changes. SOAP-Muon is written from record #44 of modded-nanogpt's track 3.
"""

import numpy as np
from optimizer_twins import orthogonalize


class SoapTwin:
    """Adam in the eigenbases of the averages of G G^T and G^T G.

    Args:
        first_bases: eigenvectors of the first step's two factors, which are not unique where a
            factor has no full rank; checked before they are used. None computes them.
    """

    def __init__(self, first_bases, every, b1=0.95, b2=0.95, eps=1e-8, max_side=10_000):
        self.first_bases, self.every, self.max_side = first_bases, every, max_side
        self.b1, self.b2, self.eps = b1, b2, eps
        self.calls, self.rotated_momentum, self.square = 0, 0.0, 0.0

    def __call__(self, g):
        if self.calls == 0:
            self.factors = [np.zeros((n, n)) if n <= self.max_side else None for n in g.shape]
            self.bases = [None, None]
        u = np.zeros_like(g) if self.calls == 0 else self.direction(g)
        momentum = self.project_back(self.rotated_momentum)
        for side, product in enumerate((g @ g.T, g.T @ g)):
            if self.factors[side] is not None:
                self.factors[side] = self.b2 * self.factors[side] + (1 - self.b2) * product
                if self.calls == 0:
                    self.bases[side] = self.eigenvectors(side)
        if self.calls and self.calls % self.every == 0:
            self.power_iteration()
        self.rotated_momentum = self.project(momentum)
        self.calls += 1
        return u

    def project(self, x):
        left, right = self.bases
        x = x if left is None or np.isscalar(x) else left.T @ x
        return x if right is None or np.isscalar(x) else x @ right

    def project_back(self, x):
        left, right = self.bases
        x = x if left is None or np.isscalar(x) else left @ x
        return x if right is None or np.isscalar(x) else x @ right.T

    def direction(self, g):
        t, rotated = self.calls, self.project(g)
        self.rotated_momentum = self.b1 * self.rotated_momentum + (1 - self.b1) * rotated
        self.square = self.b2 * self.square + (1 - self.b2) * rotated**2
        adam = self.rotated_momentum / (np.sqrt(self.square) + self.eps)
        return self.project_back(adam) * np.sqrt(1 - self.b2**t) / (1 - self.b1**t)

    def eigenvectors(self, side):
        factor = self.factors[side]
        if self.first_bases is None:
            return np.linalg.eigh(factor)[1][:, ::-1]
        basis = self.first_bases[side]
        values = basis.T @ factor @ basis
        largest = values.max()
        assert np.abs(basis.T @ basis - np.eye(len(basis))).max() < 1e-12
        assert np.abs(values - np.diag(np.diag(values))).max() < 1e-12 * largest
        assert (np.diff(np.diag(values)) < 1e-12 * largest).all()
        return basis

    def power_iteration(self):
        for side, (factor, basis) in enumerate(zip(self.factors, self.bases, strict=True)):
            if factor is not None:
                estimates = np.einsum("ij,ik,kj->j", basis, factor, basis)
                order = np.argsort(estimates)[::-1]
                self.square = np.take(self.square, order, axis=side)
                self.bases[side] = np.linalg.qr(factor @ basis[:, order])[0]


class SoapMuonTwin(SoapTwin):
    """Nesterov momentum, divided by the root of its averaged rotated squares, orthogonalised."""

    def __init__(self, *args, eps=1e-14, **options):
        super().__init__(*args, eps=eps, **options)
        self.momentum = 0.0

    def __call__(self, g):
        self.momentum = self.momentum + (1 - self.b1) * (g - self.momentum)
        ahead = g + self.b1 * (self.momentum - g)
        if self.calls:
            rotated = self.project(ahead)
            self.square = self.b2 * self.square + (1 - self.b2) * rotated**2
            divided = self.project_back(rotated / np.maximum(self.square, self.eps**2) ** 0.5)
            ahead = divided * (np.linalg.norm(ahead) / np.linalg.norm(divided))
        super().__call__(g)
        return orthogonalize(ahead) * max(1.0, g.shape[1] / g.shape[0]) ** 0.5

    def direction(self, g):
        return g  # the base class only updates factors and bases
