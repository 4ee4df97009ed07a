"""
Rayleigh-Benard convection: a fluid between a warm and a cold wall, driven by its buoyancy.

Between walls at y = 0 (b = 1) and y = 1 (b = 0), no slip; x is periodic on [0, 4). As in The Well:

    b_t + u.grad b = kappa lap b,   u_t + u.grad u + grad p = nu lap u + b e_y,   div u = 0
    kappa = (Ra Pr)^(-1/2),   nu = (Ra/Pr)^(-1/2)
"""
import numpy as np
import torch
from numpy.polynomial import legendre

from systems import Preset, System
from systems.numerics import ExponentialSolver, column, fluid_statistics

def legendre_basis(series, y):
    """Legendre series (degree + 1, n) in 2y - 1 -> values, slopes, curvatures at y, (len(y), n)."""
    return [2.0**d * legendre.legval(2 * y - 1, legendre.legder(series, d)).T for d in range(3)]

def decay_modes(mass, stiffness):
    """Eigenvalues (n,), vectors (n, n), orthonormal under mass, of stiffness a = value mass a."""
    scale = np.diag(np.diag(stiffness)**-0.5)
    c = np.linalg.inv(np.linalg.cholesky(scale @ stiffness @ scale)) @ scale
    inverse, vectors = np.linalg.eigh(c @ mass @ c.T)       # 1 / eigenvalue: slow modes are precise
    return 1 / inverse, c.T @ vectors / np.sqrt(inverse)

class RayleighBenard(ExponentialSolver):
    """rayleigh, prandtl: (B,). b: (B, Nx, Ny), the buoyancy at the start, on Chebyshev nodes in y.

    A Galerkin method: Fourier modes exp(ikx) times polynomials of degree < Ny that meet the walls'
    conditions, combined into modes that only decay under diffusion (of the flow: Stokes modes). The
    state is their amplitudes, `linear` their rates. The flow u = psi_y, v = -psi_x and the test
    functions are incompressible: pressure drops out. Products are formed on 3/2 as many points.
    """
    def __init__(self, rayleigh, prandtl, b):
        B, Nx, Ny = b.shape
        K, Q = Nx // 2, 3 * Ny // 2
        self.Nx, self.products_x, self.n = Nx, 3 * Nx // 2, Ny - 4

        # wavenumbers in x; points in y: of products, of the output, and the walls
        k = 2 * np.pi / 4.0 * np.arange(K)[:, None, None]               # (K, 1, 1)
        y, weight = legendre.leggauss(Q)
        y, weight = (y + 1) / 2, weight[:, None] / 2
        nodes = chebyshev_nodes(Ny)
        points = np.concatenate([y, nodes, [0.0, 1.0]])
        products, output, walls = slice(Q), slice(Q, Q + Ny), slice(Q + Ny, None)

        def real(a):                                                    # in the solver's dtype
            return b.new_tensor(np.ascontiguousarray(a))
        def weighted(f):                                                # for integrals over y
            return (f[..., products, :] * weight).swapaxes(-1, -2)
        def inner(f, g):                                                # the integral of f g
            return weighted(f) @ g[..., products, :]

        # buoyancy, minus the conductive 1 - y: L_n - L_{n+2} is zero at both walls
        dirichlet = np.eye(Ny, Ny - 2) - np.eye(Ny, Ny - 2, -2)
        chi, chi1, _ = legendre_basis(dirichlet, points)
        rate_b, vectors = decay_modes(inner(chi, chi), inner(chi1, chi1))

        # streamfunction: zero with its slope at both walls (Shen, SIAM J. Sci. Comput. 15, 1994)
        n = np.arange(self.n)
        clamped = np.eye(Ny, self.n) + np.eye(Ny, self.n, -4) * (2 * n + 3) / (2 * n + 7)
        clamped -= np.eye(Ny, self.n, -2) * 2 * (2 * n + 5) / (2 * n + 7)
        psi, psi1, psi2 = (np.repeat(f[None], K, 0) for f in legendre_basis(clamped, points))
        # the mean flow, k = 0, is U(y), zero at the walls: psi_y = U, with psi = 0
        psi[0], psi1[0], psi2[0] = 0, chi[:, :self.n], chi1[:, :self.n]
        chi, chi1 = chi @ vectors, chi1 @ vectors                       # (points, Ny - 2)

        # Stokes modes: mass is the integral of u.u, stiffness that of grad u:grad u
        mass = inner(psi1, psi1) + k**2 * inner(psi, psi)
        stiffness = inner(psi2, psi2) + 2 * k**2 * inner(psi1, psi1) + k**4 * inner(psi, psi)
        rate_u, vectors = (np.stack(a) for a in zip(*map(decay_modes, mass, stiffness)))
        psi, psi1, psi2 = psi @ vectors, psi1 @ vectors, psi2 @ vectors     # (K, points, n)
        self.k, self.y, self.nodes = real(k[:, 0]), real(y), real(nodes)
        self.modes = {name: (real(psi1[:, at]), real(psi[:, at]), real(chi[at]))
                      for name, at in (('products', products), ('output', output))}

        # weak form: every term is integrated against the modes, with derivatives moved onto them
        self.test_psi1_psi = torch.cat([real(weighted(f)) for f in (psi1, psi)], -1)    # (K, n, 2Q)
        self.test_psi2 = real(weighted(psi2 + k**2 * psi))
        self.test_chi, self.test_chi1 = real(weighted(chi)), real(weighted(chi1))

        # pressure, from all polynomials: (K, Ny, Ny) takes the weak Laplacian to the output nodes
        p, p1, p2 = legendre_basis(np.eye(Ny), points)
        self.test_p = [real(weighted(f)) for f in (p, p1, p2)]
        laplacian = inner(p1, p1) + k**2 * inner(p, p)
        laplacian[0, 0, 0] = 1.0                                        # k = 0, constant: zero
        inverse = np.linalg.inv(laplacian)
        inverse[0, :, 0] = 0
        self.pressure = real(p[output] @ inverse)
        self.wall_p, self.wall_curvature = real(p[walls]), real(psi2[:, walls])

        # decay rates of the modes of each run
        ra, pr = (column(v, torch.float64, b.device) for v in (rayleigh, prandtl))
        nu, kappa = (ra / pr)**-0.5, (ra * pr)**-0.5
        rates = [torch.tensor(rate, device=b.device) for rate in (rate_u, rate_b + k[:, 0]**2)]
        self.linear = -torch.cat([nu * rates[0], kappa * rates[1]], -1).to(b.dtype)
        self.nu = nu.to(b.dtype)

        # the start: b - (1 - y), from nodes to product points to modes, (B, K, 2Ny - 6)
        from_nodes = np.linalg.inv(legendre.legvander(2 * nodes - 1, Ny - 1))
        interpolate = real(legendre.legvander(2 * y - 1, Ny - 1) @ from_nodes)
        excess = torch.fft.rfft((b - (1 - self.nodes)) @ interpolate.T, dim=1)[:, :K] / Nx
        self.state = torch.cat([excess.new_zeros(B, K, self.n), apply(self.test_chi, excess)], -1)

    def evaluate(self, state, points):
        """u, v and b - (1 - y) of every wavenumber at 'products' or 'output': (3, B, K, points)."""
        psi1, psi, chi = self.modes[points]
        flow, excess = state[..., :self.n], state[..., self.n:]
        return torch.stack([apply(psi1, flow), -1j * self.k * apply(psi, flow), apply(chi, excess)])

    def product_grid(self, modes):          # of `evaluate` -> u, v, b (B, 3Nx/2, Q)
        u, v, b = torch.fft.irfft(modes * self.products_x, n=self.products_x, dim=-2)
        return u, v, b + (1 - self.y)

    def wavenumbers(self, *fields):         # on the product grid -> Fourier modes in x (B, K, Q)
        return torch.fft.rfft(torch.stack(fields), dim=-2)[..., :len(self.k), :] / self.products_x

    def rate(self):
        u, v, _ = self.product_grid(self.evaluate(self.state, 'products'))
        return (u.abs() * self.k.max() + v.abs() / torch.gradient(self.y)[0]).max().item()

    def tendency(self, state):
        # products on the grid; the modes of b lack 1 - y, which ik makes zero
        modes = self.evaluate(state, 'products')
        u, v, b = self.product_grid(modes)
        uv, vv_uu, ub, vb = self.wavenumbers(u * v, v * v - u * u, u * b, v * b)
        ik = 1j * self.k

        # against the modes of the flow and of buoyancy
        flow = ik * apply(self.test_psi1_psi, torch.cat([vv_uu, modes[2]], -1))
        flow = flow + apply(self.test_psi2, uv)
        return torch.cat([flow, apply(self.test_chi1, vb) - ik * apply(self.test_chi, ub)], -1)

    def fields(self):
        """Buoyancy, pressure (its integral is zero) and velocity, on the Chebyshev nodes."""
        u, v, b = self.product_grid(self.evaluate(self.state, 'products'))
        uu, uv, vv, b = self.wavenumbers(u * u, u * v, v * v, b)

        # the momentum equation times grad q: grad q.u_t is zero, viscosity leaves the walls' q v_yy
        ik, (q, q1, q2) = 1j * self.k, self.test_p
        v_yy = -ik * apply(self.wall_curvature, self.state[..., :self.n])   # (B, K, 2)
        force = apply(q1, b) + apply(q2, vv) - 2 * ik * apply(q1, uv) + ik**2 * apply(q, uu)
        force = force + self.nu * (v_yy[..., 1:] * self.wall_p[1] - v_yy[..., :1] * self.wall_p[0])

        out = torch.cat([self.evaluate(self.state, 'output'), apply(self.pressure, force)[None]])
        u, v, b, p = torch.fft.irfft(out * self.Nx, n=self.Nx, dim=-2)
        return {'buoyancy': b + (1 - self.nodes), 'pressure': p, 'velocity': torch.stack([u, v], 3)}

    def tail(self):
        """Of kinetic energy or buoyancy variance, the larger, in the last third of k or degrees."""
        u, v, b = self.evaluate(self.state, 'products')
        b[:, 0] += 1 - self.y
        degree = torch.arange(self.n + 4, device=self.y.device, dtype=self.y.dtype)
        energy = apply(self.test_p[0], torch.cat([u, v, b])).abs().square() * (2 * degree + 1)
        energy[:, 0] /= 2                                               # k = 0 has no conjugate
        u, v, b = energy.chunk(3)
        outer = (self.k > self.k.max() * 2 / 3) | (degree > degree.max() * 2 / 3)
        return torch.maximum(*((e * outer).sum((1, 2)) / e.sum((1, 2)).clamp(min=1e-30)
                               for e in (u + v, b)))

def apply(matrix, x):
    """A real matrix (a, n), or one a wavenumber (K, a, n), times complex x (B, K, n): (B, K, a)."""
    B, K, n = x.shape
    if matrix.dim() == 2:
        return torch.complex(x.real @ matrix.T, x.imag @ matrix.T)

    # runs, real and imaginary parts side by side: one product for each wavenumber
    columns = torch.view_as_real(x).permute(1, 2, 0, 3).reshape(K, n, 2 * B)
    y = (matrix @ columns).view(K, -1, B, 2).permute(2, 0, 1, 3)
    return torch.view_as_complex(y.contiguous())

def chebyshev_nodes(n):
    """The n Chebyshev-Gauss nodes in (0, 1), ascending."""
    return (1 - np.cos(np.pi * (np.arange(n) + 0.5) / n)) / 2

def rayleigh_benard_start(Nx, Ny, db, seed, noise=1e-3, dtype=torch.float32, device='cpu'):
    """Buoyancy (Nx, Ny): (1 - y) db + y (1 - y) times smooth noise, which is alike on all grids."""
    rng = np.random.default_rng(seed)
    x, y = np.arange(Nx)[:, None] * (2 * np.pi / Nx), chebyshev_nodes(Ny)[None]
    wave = sum(rng.normal() * np.cos(i * x + 2 * np.pi * rng.random()) * np.sin(j * np.pi * y)
               for i in range(1, 13) for j in range(1, 5))
    b = (1 - y) * db + y * (1 - y) * noise * wave / np.sqrt(12)         # 48 terms of variance 1/4
    return torch.tensor(b, dtype=dtype, device=device)

def solver(pairs, keys, p, device):
    """The solver of a batch: the parameters and the key [seed, split, pair, run] of each run."""
    starts = []
    for seed, split, pair, run in keys:
        # each run has its own: in The Well they are five, and tell training from test runs nothing
        db = np.random.default_rng([seed, split, pair, run, 1]).uniform(*p.settings['db'])
        starts.append(rayleigh_benard_start(*p.grid, db, [seed, split, pair, run],
                                            p.settings['noise'], device=device))
    return RayleighBenard(*zip(*pairs), torch.stack(starts))

def statistics(f, grid):
    """Of the flow and its buoyancy b, which puts in the power <v b>."""
    v, b = f['velocity_y'], f['buoyancy']
    return fluid_statistics(f['velocity_x'], v, b, grid.mean(v * b), grid)

PRANDTL = 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0
SYSTEM = System(
    periodic=(True, False), symmetries=(0, 1),                          # gravity leaves x -> -x
    log_labels=('Rayleigh',), symbols={'Rayleigh': 'Ra', 'Prandtl': 'Pr'}, picture=('buoyancy',),
    statistics=statistics, crop=((0.375, 0.625), (0, 1)), resolution=224, stride=4, noise=0.0,
    lr=1e-4, epochs=30.0, probe_windows=(10240, 4800),
    solver=solver, dt_save=0.25, axes=lambda nx, ny: [np.arange(nx) * 4 / nx, chebyshev_nodes(ny)],
    scalars=lambda rayleigh, prandtl: {'Prandtl': prandtl, 'Rayleigh': rayleigh},
    file='rayleigh_benard_Rayleigh_{Rayleigh:g}_Prandtl_{Prandtl:g}.hdf5',
    presets={
        'nano': Preset(
            (96, 32), 80, [(r, p) for p in PRANDTL for r in (2.5e3, 8e3, 2.5e4, 8e4)],
            dict(train=3, valid=1, test=5), 4, settings=dict(noise=0.1, db=(0.2, 1.0)),
            about='96 x 32, 80 frames, 28 pairs at Ra 2.5e3 to 8e4, 252 runs: 0.9 GB, 2 minutes'),
        'well': Preset(
            (512, 128), 200, [(r, p) for p in PRANDTL for r in (1e6, 1e7, 1e8, 1e9, 1e10)],
            dict(train=40, valid=5, test=5), 1, settings=dict(noise=1e-3, db=(0.2, 1.0)),
            about='512 x 128, 200 frames, 35 pairs, 1750 runs: 370 GB; for a GPU, not timed')})
