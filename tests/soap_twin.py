"""SOAP and SOAP-Muon of one matrix in NumPy float64, which shares no code with jaxtrain.

Written from Vyas et al. 2024 (algorithm 3) and nikhilvyas/SOAP, soap.py: here the momentum is
stored in the rotated basis and carried along whenever the basis changes. SOAP-Muon follows record
#44 of modded-nanogpt's track 3. Matrices are [outputs, inputs], as in PyTorch.
"""

import numpy as np


class SoapTwin:
    """Adam in the eigenbasis of left = average of G G^T and right = average of G^T G."""

    def __init__(self, shape, b1=0.95, b2=0.95, eps=1e-8, every=10, max_side=10_000):
        self.b1, self.b2, self.eps, self.every = b1, b2, eps, every
        self.calls = 0
        self.factors = [np.zeros((n, n)) if n <= max_side else None for n in shape]
        self.bases = [None if f is None else np.eye(len(f)) for f in self.factors]
        self.rotated_momentum, self.square = np.zeros(shape), np.zeros(shape)

    def project(self, x):
        left, right = self.bases
        x = x if left is None else left.T @ x
        return x if right is None else x @ right

    def project_back(self, x):
        left, right = self.bases
        x = x if left is None else left @ x
        return x if right is None else x @ right.T

    def step(self, g, first_bases=None):
        """Returns the direction for one gradient; the caller subtracts rate times it.

        first_bases: eigenvectors of the first step's factors, where they are not unique.
        """
        u = np.zeros_like(g) if self.calls == 0 else self._direction(g)
        momentum = self.project_back(self.rotated_momentum)
        for side, product in enumerate((g @ g.T, g.T @ g)):
            if self.factors[side] is not None:
                self.factors[side] = self.b2 * self.factors[side] + (1 - self.b2) * product
        if self.calls == 0:
            self._first_bases(first_bases)
        elif self.calls % self.every == 0:
            self._power_iteration()
        self.rotated_momentum = self.project(momentum)
        self.calls += 1
        return u

    def _direction(self, g):
        t, rotated = self.calls, self.project(g)
        self.rotated_momentum = self.b1 * self.rotated_momentum + (1 - self.b1) * rotated
        self.square = self.b2 * self.square + (1 - self.b2) * rotated**2
        adam = self.rotated_momentum / (np.sqrt(self.square) + self.eps)
        return self.project_back(adam) * np.sqrt(1 - self.b2**t) / (1 - self.b1**t)

    def _first_bases(self, given):
        for side, factor in enumerate(self.factors):
            if factor is None:
                continue
            basis = np.linalg.eigh(factor)[1][:, ::-1]
            if given is not None and given[side] is not None:
                # The given one must also consist of eigenvectors, the largest eigenvalue first.
                values = given[side].T @ factor @ given[side]
                scale = np.abs(values).max()
                assert np.abs(given[side].T @ given[side] - np.eye(len(factor))).max() < 1e-12
                assert np.abs(values - np.diag(np.diag(values))).max() < 1e-12 * scale
                assert (np.diff(np.diag(values)) < 1e-12 * scale).all()
                basis = given[side]
            self.bases[side] = basis

    def _power_iteration(self):
        for side, (factor, basis) in enumerate(zip(self.factors, self.bases, strict=True)):
            if factor is None:
                continue
            estimates = np.einsum("ij,ik,kj->j", basis, factor, basis)
            order = np.argsort(estimates)[::-1]
            self.square = np.take(self.square, order, axis=side)
            self.bases[side] = np.linalg.qr(factor @ basis[:, order])[0]


class SoapMuonTwin(SoapTwin):
    """Momentum divided by the root of its averaged rotated squares, then orthogonalised."""

    def __init__(self, shape, iterations, eps=1e-8, **options):
        super().__init__(shape, eps=eps, **options)
        self.momentum, self.iterations = np.zeros(shape), iterations

    def step(self, g, first_bases=None):
        self.momentum += (1 - self.b1) * (g - self.momentum)
        ahead = g + self.b1 * (self.momentum - g)
        if self.calls:
            rotated = self.project(ahead)
            self.square = self.b2 * self.square + (1 - self.b2) * rotated**2
            floored = np.maximum(self.square, self.eps**2)
            divided = self.project_back(rotated / floored**0.5)
            ahead = divided * (np.linalg.norm(ahead) / np.linalg.norm(divided))
        super().step(g, first_bases)
        return self._orthogonalize(ahead)

    def _direction(self, g):
        return g  # the base class only updates factors and bases

    def _orthogonalize(self, x):
        """Newton-Schulz, and the factor of the shape: sqrt(max(1, outputs / inputs))."""
        outputs, inputs = x.shape
        x = x / np.linalg.norm(x)
        for a, b, c in self.iterations:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return max(1, outputs / inputs) ** 0.5 * x
