"""
Three PDEs, solved for a batch of runs at once, each run with its own parameters, on CPU or GPU.

    ActiveMatter       rod-like active particles in a Stokes fluid        Fourier x Fourier
    ShearFlow          incompressible flow that carries a tracer          Fourier x Fourier
    RayleighBenard     convection between a warm and a cold wall          Fourier x Stokes modes

A solver is made from its runs' parameters and initial fields; the dtype of the fields (float32 or float64)
and their device are the solver's. `advance(duration)` moves the runs on; `fields()` gives The Well's fields
at present, {name: (B, Nx, Ny[, 2[, 2]])}; `tail()` tells how well they are resolved: (B,), the share of the
energy that sits in the last third of the spectrum. Equations: The Well's, arXiv 2412.00568, and its papers.
"""
from math import ceil

import numpy as np
import torch
from numpy.polynomial import legendre


def periodic_wavenumbers(shape, lengths, like):
    """kx (Nx, 1), ky (1, Ny/2+1) of rfft2 on a periodic box, and 1 where the 2/3 rule keeps a mode, else 0.

    In the dtype and on the device of the tensor `like`.
    """
    (Nx, Ny), (LX, LY) = shape, lengths
    kx = like.new_tensor(2 * np.pi / LX * np.fft.fftfreq(Nx, 1 / Nx)).view(Nx, 1)
    ky = like.new_tensor(2 * np.pi / LY * np.arange(Ny // 2 + 1)).view(1, -1)
    return kx, ky, ((kx.abs() < kx.abs().max() * 2 / 3) & (ky < ky.max() * 2 / 3)).to(like.dtype)


def to_grid(f, shape):
    """rfft2's inverse, (..., Nx, Ny/2+1) -> (..., Nx, Ny), in one flat batch: twice as fast on CPU."""
    return torch.fft.irfft2(f.flatten(0, -3), s=shape).view(*f.shape[:-2], *shape)


def share_of_tail(f, kx, ky):
    """Share of the sum of |f|^2, f (B, C, Nx, Ny/2+1) in Fourier space, beyond 2/3 of max kx or max ky: (B,)."""
    energy = f.abs().square()
    energy[..., 1:] *= 2                                                 # rfft holds half of the spectrum
    energy[..., 0, 0] = 0                                                # the mean is no scale
    outer = (kx > kx.max() * 2 / 3) | (ky > ky.max() * 2 / 3)
    return (energy * outer).sum((1, 2, 3)) / energy.sum((1, 2, 3)).clamp(min=1e-30)


# ---------------------------------------------------------------------------------------------
# active matter
#
# The kinetic theory of Maddu, Weady and Shelley (J. Comput. Phys. 504, 2024) in two dimensions, with the
# Bingham closure. The unknowns are moments of the orientation distribution Psi(x, theta): the concentration
# c = <1> and the complex nematic moment m = <exp(2i theta)>; D = <pp> is
# (c I + [[Re m, Im m], [Im m, -Re m]]) / 2. With the strain rate e = E_xx + i E_xy and the vorticity
# w = v_x - u_y of the flow,
#
#     c_t + u.grad c = d_T lap c
#     m_t + u.grad m = i w m + A c - conj(A) m4 + d_T lap m - 4 d_R m,        A = e + zeta m
#     -lap u + grad P = div Sigma,   div u = 0
#     Sigma_xx + i Sigma_xy = alpha/2 m + beta/4 (e c + conj(e) m4) - zeta beta/4 (c m - conj(m) m4)
#
# alpha (< 0: pushers) is the dipole strength, zeta the strength with which neighbours align.
# Pseudo-spectral in space (periodic box, 2/3 dealiasing), integrating-factor Heun in time.

BOX = 10.0              # side of the periodic box, in rod lengths
D_T, D_R = 0.05, 0.05   # translational and rotational diffusion
BETA = 0.8              # particle density in the constraint stress


def bingham_table(degree=20):
    """Chebyshev coefficients (float64, variable x = 2 r^2 - 1) of h(r) = |m4| / (c r^2), r = |m|/c.

    A Bingham distribution exp(kappa cos 2(theta - theta0)) has r = I1(kappa)/I0(kappa) and
    |m4|/c = I2(kappa)/I0(kappa) = 1 - 2 r/kappa; so m4 = h(r) m^2 / c, with h rising from 1/2
    (isotropic) to 1 (perfectly aligned). kappa(r) is found by bisection on the integrals.
    """
    k = degree + 1
    x = np.cos(np.pi * (np.arange(k) + 0.5) / k)                         # Chebyshev nodes
    r = np.sqrt((x + 1) / 2)
    theta = np.pi * (np.arange(4096) + 0.5) / 4096                       # of 2 theta, half a turn
    moment = lambda kappa, n: np.mean(np.exp(kappa[:, None] * (np.cos(theta) - 1)) * np.cos(n * theta), axis=1)
    low, high = np.full(k, 1e-9), np.full(k, 1e5)
    for _ in range(100):
        mid = np.sqrt(low * high)
        below = moment(mid, 1) / moment(mid, 0) < r
        low, high = np.where(below, mid, low), np.where(below, high, mid)
    h = moment(low, 2) / moment(low, 0) / r**2
    return np.polynomial.chebyshev.chebfit(x, h, degree)


CLOSURE = bingham_table().tolist()


def fourth_moment(c, m):
    """m4 = <exp(4i theta)> of the Bingham distribution with moments c (real) and m (complex)."""
    q = m / c
    x = (2 * (q.real**2 + q.imag**2) - 1).clamp(max=1.0)
    b1 = b2 = torch.zeros_like(x)
    for a in CLOSURE[:0:-1]:                                             # Clenshaw's recurrence
        b1, b2 = a + 2 * x * b1 - b2, b1
    return c * (CLOSURE[0] + x * b1 - b2) * q * q


class ActiveMatter:
    """A batch of B runs on an N x N periodic grid, each with its own alpha and zeta.

    alpha, zeta: (B,). c: (B, N, N) real and m: (B, N, N) complex are the state; the first grid
    axis is x, the second y. dtype float32 or float64. `sweeps` fixed-point iterations solve the
    Stokes equation, whose stress contains the strain rate; each gains about a factor of ten.
    """

    def __init__(self, alpha, zeta, c, m, dt, box=BOX, d_t=D_T, d_r=D_R, beta=BETA, sweeps=2):
        B, N, _ = c.shape
        dtype, device = c.dtype, c.device
        column = lambda v: torch.as_tensor(v, dtype=dtype, device=device).view(-1, 1, 1)
        self.alpha, self.zeta = column(alpha), column(zeta)
        self.beta, self.sweeps, self.dt, self.N = beta, sweeps, dt, N
        kx, ky, self.keep = periodic_wavenumbers((N, N), (box, box), c)
        k2 = kx**2 + ky**2
        self.ikx, self.iky = 1j * kx * self.keep, 1j * ky * self.keep
        # streamfunction psi of the flow driven by a traceless stress s = s_xx + i s_xy:
        # lap^2 psi = (d_xx - d_yy) s_xy - 2 d_xy s_xx; u = psi_y, v = -psi_x
        inverse_k4 = torch.where(k2 > 0, 1 / k2.clamp(min=1e-12)**2, torch.zeros_like(k2)) * self.keep
        self.psi_xx, self.psi_xy = 2 * kx * ky * inverse_k4, -(kx**2 - ky**2) * inverse_k4
        # e = (-kx ky + i (kx^2 - ky^2)/2) psi. The stress part beta/4 e of an isotropic, uniform
        # suspension only thickens the fluid, by 1 + beta/8: it is solved exactly, the rest by sweeps.
        self.exx_psi, self.exy_psi = -kx * ky, (kx**2 - ky**2) / 2
        self.thickening = 1 + beta / 8
        self.k2 = k2
        decay = torch.stack([-d_t * k2, -d_t * k2 - 4 * d_r, -d_t * k2 - 4 * d_r])
        self.propagator = torch.exp(decay * dt)                          # (3, N, N/2+1)
        self.state = torch.fft.rfft2(torch.stack([c, m.real, m.imag], 1)) * self.keep
        self.e = torch.zeros_like(m)                                     # last strain rate: the sweeps' first guess

    def grid(self, f):
        return to_grid(f, (self.N, self.N))

    def flow(self, c, m, m4):
        """Streamfunction (B, N, N/2+1), in Fourier space, and strain rate e (B, N, N) of the Stokes flow."""
        active = self.alpha / 2 * m - self.zeta * self.beta / 4 * (c * m - m.conj() * m4)
        e = self.e
        for _ in range(self.sweeps):
            stress = active + self.beta / 4 * ((c - 1) * e + e.conj() * m4)
            s = torch.fft.rfft2(torch.stack([stress.real, stress.imag]))
            psi = (self.psi_xx * s[0] + self.psi_xy * s[1]) / self.thickening
            e = torch.complex(*self.grid(torch.stack([self.exx_psi * psi, self.exy_psi * psi])))
        self.e = e
        return psi, e

    def tendency(self, state):
        """Everything but diffusion: d/dt of the Fourier state (B, 3, N, N/2+1)."""
        grid = self.grid(torch.cat([state, self.ikx * state, self.iky * state], 1))     # (B, 9, N, N)
        c, m = grid[:, 0], torch.complex(grid[:, 1], grid[:, 2])
        m4 = fourth_moment(c, m)
        psi, e = self.flow(c, m, m4)
        u, v, w = self.grid(torch.stack([self.iky * psi, -self.ikx * psi, self.k2 * psi]))
        A = e + self.zeta * m
        turn = 1j * w * m + A * c - A.conj() * m4
        change = -(u[:, None] * grid[:, 3:6] + v[:, None] * grid[:, 6:9])
        change = change + torch.stack([torch.zeros_like(c), turn.real, turn.imag], 1)
        return torch.fft.rfft2(change) * self.keep

    def step(self):
        """One integrating-factor Heun step: diffusion exactly, the rest to second order in dt."""
        E, dt, q = self.propagator, self.dt, self.state
        n0 = self.tendency(q)
        n1 = self.tendency(E * (q + dt * n0))
        self.state = E * q + dt / 2 * (E * n0 + n1)

    def advance(self, duration):
        steps = round(duration / self.dt)
        if abs(steps * self.dt - duration) > 1e-6 * duration:
            raise ValueError(f'{duration} is not a whole number of time steps of {self.dt}')
        for _ in range(steps):
            self.step()

    def moments(self):
        """dict of (B, N, N) grids: c, m (complex), u, v, e (complex), of the present state."""
        c, m_re, m_im = self.grid(self.state).unbind(1)
        m = torch.complex(m_re, m_im)
        m4 = fourth_moment(c, m)
        for _ in range(3):                                               # converge e to round-off for output
            psi, e = self.flow(c, m, m4)
        u, v = self.grid(torch.stack([self.iky * psi, -self.ikx * psi]))
        return {'c': c, 'm': m, 'u': u, 'v': v, 'e': e}

    def fields(self):
        f = self.moments()
        c, m, e = f['c'], f['m'], f['e']
        tensor = lambda xx, xy, yy: torch.stack([xx, xy, xy, yy], -1).unflatten(-1, (2, 2))
        return {'concentration': c, 'velocity': torch.stack([f['u'], f['v']], -1),
                'D': tensor((c + m.real) / 2, m.imag / 2, (c - m.real) / 2), 'E': tensor(e.real, e.imag, -e.real)}

    def tail(self):
        """Of |m|^2, beyond two thirds of the largest wavenumber kept along either axis: (B,)."""
        return share_of_tail(self.state[:, 1:], self.ikx.abs(), self.iky.abs())


def active_matter_start(N, seed, dtype=torch.float32, device='cpu', modes=8, amplitude=0.05):
    """c = 1 and m = a few small random plane waves: (N, N) real and complex. One seed, one state."""
    rng = np.random.default_rng(seed)
    x = np.arange(N) * (2 * np.pi / N)
    m = np.zeros((N, N), complex)
    for _ in range(modes):
        kx, ky = rng.integers(-3, 4, size=2)
        a = amplitude * (rng.normal() + 1j * rng.normal()) / np.sqrt(2 * modes)
        m += a * np.exp(1j * (kx * x[:, None] + ky * x[None, :]))
    m = torch.tensor(m, device=device).to(torch.complex64 if dtype == torch.float32 else torch.complex128)
    return torch.ones(N, N, dtype=dtype, device=device), m


# ---------------------------------------------------------------------------------------------
# time stepping of the two fluids: diffusion exactly, everything else to fourth order

class ExponentialSolver:
    """q' = linear q + tendency(q), `linear` real and diagonal, by exponential time differencing ETDRK4.

    Cox and Matthews, J. Comput. Phys. 176, 2002. The coefficients cancel badly at small arguments and are
    taken as means over a circle around each (Kassam and Trefethen, SIAM J. Sci. Comput. 26, 2005).
    A solver sets `state` and `linear` and defines `tendency(state)` and `rate()`, the largest wavenumber
    times speed: the scheme is stable up to rate * dt of about 2.8 and is kept below 2.
    """

    LIMIT = 2.0
    schedule = None                                                      # (duration, steps) of the coefficients at hand

    def advance(self, duration):
        steps = max(ceil(duration / 0.1), ceil(duration * self.rate() / self.LIMIT))
        steps = steps if steps <= 8 else 4 * ceil(steps / 4)             # in fours: coefficients are kept for longer
        if self.schedule != (duration, steps):
            self.schedule = duration, steps
            self.set_coefficients(duration / steps)
        for _ in range(steps):
            self.step()

    def set_coefficients(self, dt):
        z = self.linear.double() * dt
        total = [torch.zeros_like(z) for _ in range(4)]
        points = 16                                                      # on the upper half; the lower is its conjugate
        for j in range(points):
            r = z + np.exp(1j * np.pi * (j + 0.5) / points)
            e = r.exp()
            for t, f in zip(total, (((r / 2).exp() - 1) / r,
                                    (-4 - r + e * (4 - 3 * r + r**2)) / r**3,
                                    2 * (2 + r + e * (r - 2)) / r**3,
                                    (-4 - 3 * r - r**2 + e * (4 - r)) / r**3)):
                t += f.real * (dt / points)
        self.decay, self.half_decay, self.half, self.first, self.middle, self.last = (
            c.to(self.linear.dtype) for c in (z.exp(), (z / 2).exp(), *total))

    def step(self):
        q, N = self.state, self.tendency
        n0 = N(q)
        a = self.half_decay * q + self.half * n0
        n1 = N(a)
        n2 = N(self.half_decay * q + self.half * n1)
        n3 = N(self.half_decay * a + self.half * (2 * n2 - n0))
        self.state = self.decay * q + self.first * n0 + self.middle * (n1 + n2) + self.last * n3


# ---------------------------------------------------------------------------------------------
# shear flow

class ShearFlow(ExponentialSolver):
    """Two-dimensional incompressible flow with a passive tracer s; x in [0, 1), y in [-1, 1), both periodic.

        u_t + u.grad u + grad p = nu lap u,  div u = 0,  s_t + u.grad s = D lap s,  nu = 1/Re,  D = nu/Sc

    reynolds, schmidt: (B,). velocity: (B, 2, Nx, Ny), projected onto div u = 0 first; tracer: (B, Nx, Ny).
    The state is vorticity w = v_x - u_y and tracer in Fourier space, dealiased by the 2/3 rule; the mean
    flow never changes. `fields()` has pressure (mean zero), tracer and velocity.
    """

    LX, LY = 1.0, 2.0

    def __init__(self, reynolds, schmidt, velocity, tracer):
        B, _, Nx, Ny = velocity.shape
        dtype, device = velocity.dtype, velocity.device
        self.shape = Nx, Ny
        kx, ky, keep = periodic_wavenumbers(self.shape, (self.LX, self.LY), tracer)
        k2 = kx**2 + ky**2
        self.ikx, self.iky = 1j * kx * keep, 1j * ky * keep
        self.inverse_k2 = torch.where(k2 > 0, 1 / k2.clamp(min=1e-12), torch.zeros_like(k2)) * keep
        column = lambda v: torch.as_tensor(v, dtype=dtype, device=device).view(-1, 1, 1)
        nu = 1 / column(reynolds)
        self.linear = -torch.stack([nu * k2, nu / column(schmidt) * k2], 1)                              # (B, 2, ..)
        self.mean_flow = velocity.mean((-2, -1)).view(B, 2, 1, 1)
        u, v = torch.fft.rfft2(velocity).unbind(1)
        self.state = torch.stack([self.ikx * v - self.iky * u, torch.fft.rfft2(tracer) * keep], 1)

    def grid(self, f):
        return to_grid(f, self.shape)

    def velocity_and_tracer(self, state):
        """u, v, s on the grid, (B, Nx, Ny) each; u = psi_y and v = -psi_x of the streamfunction, -lap psi = w."""
        w, s = state.unbind(1)
        psi = w * self.inverse_k2
        u, v, s = self.grid(torch.stack([self.iky * psi, -self.ikx * psi, s]))
        return u + self.mean_flow[:, 0], v + self.mean_flow[:, 1], s

    def rate(self):
        u, v, _ = self.velocity_and_tracer(self.state)
        return (self.ikx.abs().max() * u.abs().max() + self.iky.abs().max() * v.abs().max()).item()

    def tendency(self, state):
        u, v, s = self.velocity_and_tracer(state)
        uv, vv_uu, us, vs = torch.fft.rfft2(torch.stack([u * v, v * v - u * u, u * s, v * s]))
        curl = (self.iky**2 - self.ikx**2) * uv - self.ikx * self.iky * vv_uu                            # of -div uu
        return torch.stack([curl, -self.ikx * us - self.iky * vs], 1)

    def fields(self):
        u, v, s = self.velocity_and_tracer(self.state)
        uu, uv, vv = torch.fft.rfft2(torch.stack([u * u, u * v, v * v]))
        div_div = self.ikx**2 * uu + 2 * self.ikx * self.iky * uv + self.iky**2 * vv
        p = div_div * self.inverse_k2                                    # lap p = -div div uu
        return {'pressure': self.grid(p), 'tracer': s, 'velocity': torch.stack([u, v], -1)}

    def tail(self):
        """The larger of the shares of kinetic energy and of tracer variance beyond 2/3 of the wavenumbers kept."""
        flow, tracer = self.state[:, :1] * self.inverse_k2.sqrt(), self.state[:, 1:]
        return torch.maximum(*(share_of_tail(f, self.ikx.abs(), self.iky.abs()) for f in (flow, tracer)))


def shear_flow_start(Nx, Ny, n_shear, n_blobs, width, dtype=torch.float32, device='cpu'):
    """Velocity (2, Nx, Ny) and tracer (Nx, Ny) of The Well's shear_flow: tanh shears, sines that will roll them up."""
    x = torch.arange(Nx, dtype=torch.float64)[:, None] / Nx
    y = -1 + 2 * torch.arange(Ny, dtype=torch.float64)[None, :] / Ny
    u, v = torch.full((Nx, Ny), 0.5, dtype=torch.float64), torch.zeros(Nx, Ny, dtype=torch.float64)
    for k in range(n_shear):
        sign = 1 if k % 2 else -1
        q = n_shear * (y + 1 - (2 * k + 1) / n_shear) / (2 * width)
        u = u + sign / 2 * torch.tanh(q / 0.1)
        v = v + 0.1 * torch.sin(sign * n_blobs * np.pi * x) * torch.exp(-q**2 / 0.01)
    return torch.stack([u, v]).to(device, dtype), u.to(device, dtype)


# ---------------------------------------------------------------------------------------------
# Rayleigh-Benard convection

def legendre_basis(coefficients, y):
    """Values, first and second derivatives at y in [0, 1], (len(y), n) each, of n polynomials.

    coefficients: (degree + 1, n), of Legendre polynomials in 2y - 1.
    """
    return [2.0**d * legendre.legval(2 * y - 1, legendre.legder(coefficients, d)).T for d in range(3)]


def decay_modes(mass, stiffness):
    """Eigenvalues (n,) and vectors (n, n), orthonormal under `mass`, of stiffness a = eigenvalue mass a.

    Solved for 1 / eigenvalue, so that it is the slow, smooth modes that come out to full precision.
    """
    scale = np.diag(np.diag(stiffness)**-0.5)
    c = np.linalg.inv(np.linalg.cholesky(scale @ stiffness @ scale)) @ scale
    inverse, vectors = np.linalg.eigh(c @ mass @ c.T)
    return 1 / inverse, c.T @ vectors / np.sqrt(inverse)


class RayleighBenard(ExponentialSolver):
    """Convection between walls at y = 0 (b = 1) and y = 1 (b = 0), no slip; x periodic on [0, 4).

        b_t + u.grad b = kappa lap b,   u_t + u.grad u + grad p = nu lap u + b e_y,   div u = 0
        kappa = (Ra Pr)^(-1/2),   nu = (Ra/Pr)^(-1/2)

    rayleigh, prandtl: (B,). b: (B, Nx, Ny), the buoyancy at the start, on the Chebyshev nodes in y; u starts
    at rest. A Galerkin method in Fourier modes exp(ikx) times polynomials of degree < Ny that meet the walls'
    conditions. The flow is u = psi_y, v = -psi_x: incompressible to round-off, and, since the test functions
    are incompressible too, free of the pressure. Of these polynomials we take the combinations that only
    decay under diffusion, each at its own rate (for the flow: the Stokes modes): the state is their amplitudes,
    `linear` the rates. Products are formed on 3/2 as many points and integrated exactly (Gauss-Legendre in y).
    `fields()` has buoyancy, pressure (integral zero) and velocity, on the Chebyshev nodes.
    """

    LX = 4.0

    def __init__(self, rayleigh, prandtl, b):
        B, Nx, Ny = b.shape
        dtype, device = b.dtype, b.device
        K, Q = Nx // 2, 3 * Ny // 2
        self.Nx, self.products_x, self.n = Nx, 3 * Nx // 2, Ny - 4
        real = lambda a: torch.as_tensor(np.ascontiguousarray(a), dtype=dtype, device=device)
        k = 2 * np.pi / self.LX * np.arange(K)[:, None, None]            # (K, 1, 1)
        y, weight = legendre.leggauss(Q)
        y, weight = (y + 1) / 2, weight[:, None] / 2
        nodes = chebyshev_nodes(Ny)
        points = np.concatenate([y, nodes, [0.0, 1.0]])                  # products, output, walls
        products, output, walls = slice(Q), slice(Q, Q + Ny), slice(Q + Ny, None)
        inner = lambda f, g: (f[..., products, :] * weight).swapaxes(-1, -2) @ g[..., products, :]   # integral of f g

        # buoyancy, minus the conductive 1 - y: L_n - L_{n+2} is zero at both walls
        dirichlet = np.eye(Ny, Ny - 2) - np.eye(Ny, Ny - 2, -2)
        chi, chi1, _ = legendre_basis(dirichlet, points)
        rate_b, vectors = decay_modes(inner(chi, chi), inner(chi1, chi1))
        # streamfunction: zero with its slope at both walls (Shen, SIAM J. Sci. Comput. 15, 1994). The mean flow,
        # k = 0, is U(y), zero at the walls, with no streamfunction of its own: psi_y = U, psi = 0
        n = np.arange(self.n)
        clamped = np.eye(Ny, self.n) + np.eye(Ny, self.n, -4) * (2 * n + 3) / (2 * n + 7)
        clamped -= np.eye(Ny, self.n, -2) * 2 * (2 * n + 5) / (2 * n + 7)
        psi, psi1, psi2 = (np.repeat(f[None], K, 0) for f in legendre_basis(clamped, points))           # (K, points, n)
        psi[0], psi1[0], psi2[0] = 0, chi[:, :self.n], chi1[:, :self.n]
        chi, chi1 = chi @ vectors, chi1 @ vectors
        mass = inner(psi1, psi1) + k**2 * inner(psi, psi)                # integral of u.u
        stiffness = inner(psi2, psi2) + 2 * k**2 * inner(psi1, psi1) + k**4 * inner(psi, psi)    # of grad u:grad u
        rate_u, vectors = (np.stack(a) for a in zip(*map(decay_modes, mass, stiffness)))
        psi, psi1, psi2 = psi @ vectors, psi1 @ vectors, psi2 @ vectors

        self.k, self.y, self.nodes = real(k[:, 0]), real(y), real(nodes)
        self.modes = {where: (real(psi1[:, at]), real(psi[:, at]), real(chi[at]))
                      for where, at in (('products', products), ('output', output))}
        # weak form: every term is integrated against the modes, derivatives moved onto them
        test = lambda f: real((f[..., products, :] * weight).swapaxes(-1, -2))
        self.test_psi1_psi = torch.cat([test(psi1), test(psi)], -1)      # (K, n, 2Q)
        self.test_psi2 = test(psi2 + k**2 * psi)
        self.test_chi, self.test_chi1 = test(chi), test(chi1)
        legendres = legendre_basis(np.eye(Ny), points)                   # pressure: all polynomials
        self.test_p = [test(f) for f in legendres]
        laplacian = inner(legendres[1], legendres[1]) + k**2 * inner(legendres[0], legendres[0])
        laplacian[0, 0, 0] = 1.0                                         # k = 0, constant: fixed to zero
        inverse = np.linalg.inv(laplacian)
        inverse[0, :, 0] = 0
        self.pressure = real(legendres[0][output] @ inverse)             # (K, Ny, Ny): weak Laplacian to nodes
        self.wall_p, self.wall_curvature = real(legendres[0][walls]), real(psi2[:, walls])

        column = lambda v: torch.as_tensor(v, dtype=torch.float64, device=device).view(-1, 1, 1)
        ra, pr = column(rayleigh), column(prandtl)
        rates = lambda r: torch.as_tensor(r, device=device)
        self.nu = (ra / pr)**-0.5
        self.linear = -torch.cat([self.nu * rates(rate_u), (ra * pr)**-0.5 * rates(rate_b + k[:, 0]**2)], -1).to(dtype)
        self.nu = self.nu.to(dtype)
        interpolate = legendre.legvander(2 * y - 1, Ny - 1) @ np.linalg.inv(legendre.legvander(2 * nodes - 1, Ny - 1))
        excess = torch.fft.rfft((b - (1 - self.nodes)) @ real(interpolate).T, dim=1)[:, :K] / Nx        # (B, K, Q)
        self.state = torch.cat([excess.new_zeros(B, K, self.n), apply(self.test_chi, excess)], -1)     # (B, K, 2Ny - 6)

    def evaluate(self, state, where):
        """u, v and b - (1 - y) of every wavenumber at the product or output points: (3, B, K, points)."""
        psi1, psi, chi = self.modes[where]
        flow, excess = state[..., :self.n], state[..., self.n:]
        return torch.stack([apply(psi1, flow), -1j * self.k * apply(psi, flow), apply(chi, excess)])

    def product_grid(self, modes):
        """u, v, b where products are formed, (B, 3Nx/2, Q) each, from `evaluate`'s."""
        u, v, b = torch.fft.irfft(modes * self.products_x, n=self.products_x, dim=-2)
        return u, v, b + (1 - self.y)

    def wavenumbers(self, *fields):
        """Fields on the product grid to Fourier modes in x, (B, K, Q) each."""
        return torch.fft.rfft(torch.stack(fields), dim=-2)[..., :len(self.k), :] / self.products_x

    def rate(self):
        u, v, _ = self.product_grid(self.evaluate(self.state, 'products'))
        return (u.abs() * self.k.max() + v.abs() / torch.gradient(self.y)[0]).max().item()

    def tendency(self, state):
        modes = self.evaluate(state, 'products')
        u, v, b = self.product_grid(modes)
        uv, vv_uu, ub, vb = self.wavenumbers(u * v, v * v - u * u, u * b, v * b)
        ik = 1j * self.k                                                 # zero where modes lack the 1 - y of b
        flow = ik * apply(self.test_psi1_psi, torch.cat([vv_uu, modes[2]], -1)) + apply(self.test_psi2, uv)
        return torch.cat([flow, apply(self.test_chi1, vb) - ik * apply(self.test_chi, ub)], -1)

    def fields(self):
        u, v, b = self.product_grid(self.evaluate(self.state, 'products'))
        uu, uv, vv, b = self.wavenumbers(u * u, u * v, v * v, b)
        # the momentum equation against the gradient of every polynomial q: grad q.u_t is zero, and viscosity
        # leaves the walls' q v_yy
        ik, (q, q1, q2) = 1j * self.k, self.test_p
        v_yy = -ik * apply(self.wall_curvature, self.state[..., :self.n])                              # (B, K, 2)
        force = apply(q1, b) + apply(q2, vv) - 2 * ik * apply(q1, uv) + ik**2 * apply(q, uu)
        force = force + self.nu * (v_yy[..., 1:] * self.wall_p[1] - v_yy[..., :1] * self.wall_p[0])
        out = torch.cat([self.evaluate(self.state, 'output'), apply(self.pressure, force)[None]])
        u, v, b, p = torch.fft.irfft(out * self.Nx, n=self.Nx, dim=-2)
        return {'buoyancy': b + (1 - self.nodes), 'pressure': p, 'velocity': torch.stack([u, v], -1)}

    def tail(self):
        """The larger of the shares of kinetic energy and of buoyancy variance in the last third of k or of degrees."""
        u, v, b = self.evaluate(self.state, 'products')
        b[:, 0] += 1 - self.y
        degree = torch.arange(self.n + 4, device=self.y.device, dtype=self.y.dtype)
        energy = apply(self.test_p[0], torch.cat([u, v, b])).abs().square() * (2 * degree + 1)   # Legendre, squared
        energy[:, 0] /= 2                                                # k = 0 has no conjugate
        u, v, b = energy.chunk(3)
        outer = (self.k > self.k.max() * 2 / 3) | (degree > degree.max() * 2 / 3)
        share = lambda e: (e * outer).sum((1, 2)) / e.sum((1, 2)).clamp(min=1e-30)
        return torch.maximum(share(u + v), share(b))


def apply(matrix, x):
    """A real matrix (a, n), or one per wavenumber (K, a, n), times complex x (B, K, n) -> (B, K, a)."""
    B, K, n = x.shape
    if matrix.dim() == 2:
        return torch.complex(x.real @ matrix.T, x.imag @ matrix.T)
    columns = torch.view_as_real(x).permute(1, 2, 0, 3).reshape(K, n, 2 * B)                       # runs side by side
    return torch.view_as_complex((matrix @ columns).view(K, -1, B, 2).permute(2, 0, 1, 3).contiguous())


def chebyshev_nodes(n):
    """The n Chebyshev-Gauss nodes in (0, 1), ascending."""
    return (1 - np.cos(np.pi * (np.arange(n) + 0.5) / n)) / 2


def rayleigh_benard_start(Nx, Ny, db, seed, noise=1e-3, dtype=torch.float32, device='cpu'):
    """Buoyancy (Nx, Ny) (1 - y) db + y (1 - y) noise; smooth noise of that standard deviation, the same on any grid."""
    rng = np.random.default_rng(seed)
    x, y = np.arange(Nx)[:, None] * (2 * np.pi / Nx), chebyshev_nodes(Ny)[None]
    wave = sum(rng.normal() * np.cos(i * x + 2 * np.pi * rng.random()) * np.sin(j * np.pi * y)
               for i in range(1, 13) for j in range(1, 5))
    b = (1 - y) * db + y * (1 - y) * noise * wave / np.sqrt(12)          # 48 terms of variance 1/4
    return torch.tensor(b, dtype=dtype, device=device)
