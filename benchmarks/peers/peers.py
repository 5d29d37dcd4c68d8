"""Coterie beside what people would use instead, in one process on one thread. Run by `cmake/run peers [--quick]`.

Contenders
    Coterie              through coterie_peer.cpp, a plain Release build. Every call builds its plan; calls named "routing
                         included" also normalise rows, assign them to centroids and, in training, update those.
    ONNX Runtime         MultiHeadAttention and GroupQueryAttention on CPU, inputs and outputs bound once.
    PyTorch              scaled_dot_product_attention (1.13 has it under a leading underscore), and the same by hand:
                         matrix products and a softmax into buffers made once.
    routing-transformer  KmeansAttention; local-attention: LocalAttention, without rotary embeddings, in several block sizes,
                         for blocks smaller than the window compute fewer masked scores. Their unused dependencies are
                         replaced by empty modules.
    What cannot be imported is named in one line, and the rest runs.

Protocol
    All contenders of a case are warmed up, until they touch no new pages, then run in turns, A B C A B C ..., and timed by the CPU time of the thread. Times
    are the least and the median over rounds; ratios compare least times. A contender that computes on other threads too is
    reported: its row then says so, and it wins no bar.
    One thread for every library, pinned to one CPU. The process restarts itself with a clean environment: no variable that
    tells OpenBLAS or OpenMP which machine this is, and an allocator that keeps its pages (a first touch can cost 13 us a page on a
    virtual machine, and PyTorch allocates every intermediate result anew).
    Every contender gets the memory layout it likes best, made beforehand: tokens x heads*width for Coterie and ONNX Runtime,
    heads x tokens x width for PyTorch.

Checks
    Before a contender is timed, its output, and gradients if it has them, are compared with Coterie's on the same numbers; if
    they differ by more than float's rounding explains, the contender is not timed. A window of 256 means 256 keys in Coterie and
    ONNX Runtime and 257 in local-attention's exact mode, which is compared with Coterie's 257.
    Routing: routing-transformer gives every cluster the w tokens nearest to it, Coterie every token its nearest cluster. Data drawn
    around n/w centres, w tokens each, at random places of the sequence, makes both select the same pairs: that is the shape "w tokens
    each", in which outputs and gradients agree too. Coterie's default, k = 2n/w, is measured beside it, on data drawn around so many
    centres; it has fewer pairs, and both counts are printed. Coterie's causal heads share queries and keys by default, as
    shared_qk does; both then see themselves only when nothing else is visible. Causal and not shared, routing-transformer adds one
    learned key and value per cluster, here zero; they take a share of the output that is checked, and of gradients that are not.

Figures
    keys      visible keys per query, averaged over queries: useful pairs / (tokens x heads)
    GFLOP/s   useful operations: 4 d per pair forward, 14 d forward and backward, whatever the contender really computes
    of peak   these / the multiply-adds that this core does in registers, measured before every round (best of all)
    ratio     its least time / that of the case's first row
"""

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import platform
import resource
import statistics
import sys
import time
import types
from dataclasses import dataclass, field
from typing import Callable, Optional

HEADS, WIDTH = 8, 64
COLUMNS = HEADS * WIDTH
FORWARD, BACKWARD = 4 * WIDTH, 14 * WIDTH  # useful operations per pair: forward, forward and backward


def restart_with_clean_environment():
    """Libraries read these variables while they load: the process must be born with them."""
    mark = "COTERIE_PEERS_CLEAN_ENVIRONMENT"
    if os.environ.get(mark) == "1":
        return
    prefixes = ("OPENBLAS_", "OMP_", "GOMP_", "KMP_", "MKL_", "BLIS_", "DNNL_", "ONEDNN_", "ATEN_", "MALLOC_", "GLIBC_TUNABLES")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
    for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[threads] = "1"
    # No block of its own for a large allocation, and nothing given back: pages stay.
    environment.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="1000000000000", MALLOC_TOP_PAD_="67108864")
    environment[mark] = "1"
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def arguments():
    parser = argparse.ArgumentParser(description="Coterie beside other packages; see the head of this file.")
    parser.add_argument("--coterie", required=True, help="libcoterie_peer, built from coterie_peer.cpp")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and no 16384-token runs of what takes seconds there")
    parser.add_argument("--json", help="also write all figures to this file")
    parser.add_argument("--cpu", type=int, help="the CPU to run on; default: the last one allowed")
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    return parser.parse_args()


def pin(cpu):
    if not hasattr(os, "sched_setaffinity"):
        return "not pinned: this system cannot"
    cpu = max(os.sched_getaffinity(0)) if cpu is None else cpu
    os.sched_setaffinity(0, {cpu})
    return f"pinned to CPU {cpu}"


restart_with_clean_environment()
ARGUMENTS = arguments()
PINNED = pin(ARGUMENTS.cpu)

import numpy as np  # noqa: E402  after the environment is clean and the thread pinned


def say(text):
    print(f"peers: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------- packages


def optional(name, stubs=()):
    """The module, or None after one line that says why it is missing."""
    for stub, attribute in stubs:
        if importlib.util.find_spec(stub) is None:
            module = types.ModuleType(stub)
            setattr(module, attribute, None)
            sys.modules[stub] = module
    try:
        return importlib.import_module(name)
    except Exception as error:  # noqa: BLE001  a broken installation raises anything
        say(f"{name} is left out: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return None


onnx = optional("onnx")
onnxruntime = optional("onnxruntime") if onnx else None
torch = optional("torch")
if torch:
    torch.set_num_threads(1)
    try:
        torch.from_numpy(np.zeros(1))
    except RuntimeError as error:  # built for another NumPy
        say(f"torch is left out: {error}")
        torch = None
local_attention = routing_transformer = None
if torch:
    connections = ("hyper_connections", "get_init_and_expand_reduce_stream_functions")
    local_attention = optional("local_attention", [connections])
    if local_attention:
        routing_transformer = optional("routing_transformer.routing_transformer", [("product_key_memory", "PKM"), ("mixture_of_experts", "MoE")])
else:
    say("local-attention and routing-transformer are left out: they need torch")


def package_version(module):
    try:
        return importlib.import_module("importlib.metadata").version(module)
    except Exception:  # noqa: BLE001
        return "?"


def blas_of_torch():
    """The BLAS that Debian's torch calls is whichever the system has chosen: the reference one is many times slower."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            names = {os.path.realpath(line.split()[-1]) for line in maps if "blas" in line or "mkl" in line}
    except OSError:
        return "unknown BLAS"
    fast = [name for name in names if any(word in name for word in ("openblas", "mkl", "blis"))]
    # The library itself, rather than its neighbours that only forward to it.
    return os.path.basename(max(fast, key=os.path.getsize)) if fast else ("bundled BLAS" if not names else "REFERENCE BLAS, SLOW: install OpenBLAS")


# ----------------------------------------------------------------------------------------------------------------- Coterie


class Settings(ctypes.Structure):
    """PeerSettings of coterie_peer.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("tokens", "heads", "width", "pattern", "causal", "window", "clusters", "shared")]


DENSE, LOCAL, ROUTED = range(3)


def load_library(path):
    library = ctypes.CDLL(path)
    pointer = ctypes.c_void_p
    for name, result, parameters in (
        ("peer_error", ctypes.c_char_p, 0),
        ("peer_build", ctypes.c_char_p, 0),
        ("peer_fma_peak", ctypes.c_double, 0),
        ("peer_open", pointer, 1),
        ("peer_close", None, 1),
        ("peer_set_centroids", ctypes.c_int, 2),
        ("peer_forward", ctypes.c_int, 5),
        ("peer_attend", ctypes.c_int, 5),
        ("peer_train", ctypes.c_int, 9),
        ("peer_attend_backward", ctypes.c_int, 9),
        ("peer_pairs", ctypes.c_int64, 1),
        ("peer_log_sum_exp", ctypes.c_int, 2),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = [pointer] * parameters
    return library


LIBRARY = load_library(ARGUMENTS.coterie)


def address(array):
    assert array.dtype == np.float32 and array.flags.c_contiguous
    return array.ctypes.data


class Coterie:
    """One call of Coterie with its arrays; shared: q is x, and k is not used."""

    def __init__(self, data, pattern, causal, window=0, clusters=0, shared=False, centroids=None):
        self.data = data
        self.out = np.zeros_like(data.q)
        self.gradients = [np.zeros_like(data.q) for _ in range(3)]
        settings = Settings(len(data.q), HEADS, WIDTH, pattern, causal, window, clusters, shared)
        self.peer = LIBRARY.peer_open(ctypes.byref(settings))
        if not self.peer:
            raise RuntimeError(LIBRARY.peer_error().decode())
        inputs = [address(a) for a in (data.q, data.k, data.v)]
        self.forward_arguments = [self.peer, *inputs, address(self.out)]
        self.train_arguments = [*self.forward_arguments, address(data.d_out), *[address(g) for g in self.gradients]]
        if centroids is not None:
            self.call(LIBRARY.peer_set_centroids, self.peer, address(centroids))
        self.shared = shared

    def __del__(self):
        if getattr(self, "peer", None):
            LIBRARY.peer_close(self.peer)

    @staticmethod
    def call(function, *parameters):
        if function(*parameters):
            raise RuntimeError(LIBRARY.peer_error().decode())

    def forward(self):
        self.call(LIBRARY.peer_forward, *self.forward_arguments)

    def attend(self):
        self.call(LIBRARY.peer_attend, *self.forward_arguments)

    def train(self):
        self.call(LIBRARY.peer_train, *self.train_arguments)

    def attend_backward(self):
        self.call(LIBRARY.peer_attend_backward, *self.train_arguments)

    def pairs(self):
        return LIBRARY.peer_pairs(self.peer)

    def log_sum_exp(self):
        out = np.empty((len(self.out), HEADS), np.float32)
        self.call(LIBRARY.peer_log_sum_exp, self.peer, address(out))
        return out

    def outputs(self):
        return [self.out]

    def outputs_and_gradients(self):
        """The arrays to compare with a peer's; of a shared call the gradient of x stands for those of q and k."""
        return [self.out, self.gradients[0], self.gradients[2]] if self.shared else [self.out, *self.gradients]


# -------------------------------------------------------------------------------------------------------------------- data


class Data:
    """q, k, v and the gradient of the output, tokens x heads*width; and for PyTorch 1 x heads x tokens x width."""

    def __init__(self, q, k, v, d_out):
        self.q, self.k, self.v, self.d_out = (np.ascontiguousarray(a, np.float32) for a in (q, k, v, d_out))
        self.cache = {}

    def torch(self, name, gradient=False):
        key = (name, gradient)
        if key not in self.cache:
            tensor = torch.from_numpy(by_head(getattr(self, name)).copy())[None]
            self.cache[key] = tensor.requires_grad_(gradient)
        return self.cache[key]


def by_head(array):
    return array.reshape(-1, HEADS, WIDTH).transpose(1, 0, 2)


def by_token(tensor):
    return tensor.detach().numpy().reshape(HEADS, -1, WIDTH).transpose(1, 0, 2).reshape(-1, COLUMNS)


def random_data(tokens):
    random = np.random.default_rng(0)
    return Data(*(random.standard_normal((tokens, COLUMNS), dtype=np.float32) for _ in range(4)))


def unit_rows(array):
    """Rows without mean, of length 1: for them Coterie's normalisation and routing-transformer's are the same but for a factor."""
    array = array - array.mean(-1, keepdims=True)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


class ClusteredData(Data):
    """Tokens of every head around `clusters` centres, at random places: even, tokens / clusters each, or drawn uniformly."""

    def __init__(self, tokens, clusters, even, shared):
        random = np.random.default_rng(1)
        self.centres = unit_rows(random.standard_normal((HEADS, clusters, WIDTH))).astype(np.float32)

        def rows():
            x = np.empty((HEADS, tokens, WIDTH))
            for h in range(HEADS):
                labels = random.permutation(np.arange(tokens) % clusters) if even else random.integers(clusters, size=tokens)
                x[h] = self.centres[h][labels] + 0.09 * random.standard_normal((tokens, WIDTH))
            return (WIDTH**0.5 * unit_rows(x)).transpose(1, 0, 2).reshape(tokens, COLUMNS)

        q = rows()
        k = q if shared else rows()
        v, d_out = (random.standard_normal((tokens, COLUMNS), dtype=np.float32) for _ in range(2))
        super().__init__(q, k, v, d_out)

    def centroids(self):
        """For Coterie, whose normalised rows are sqrt(width) long."""
        return np.ascontiguousarray(self.centres * np.float32(WIDTH**0.5))


# ------------------------------------------------------------------------------------------------------------------- peers


@dataclass
class Contender:
    name: str
    call: Callable  # what is timed
    pairs: Callable  # useful query-key pairs of all heads
    outputs: Callable  # arrays that the last call made
    expected: Optional[Callable] = None  # what they must equal; None: Coterie itself
    package: str = "coterie"
    keep: object = None  # what must live as long as `call`
    least: float = 0
    median: float = 0
    rounds: int = 0
    difference: Optional[float] = None
    other_threads: bool = False


def of_coterie(name, coterie, call="forward"):
    outputs = coterie.outputs_and_gradients if call in ("train", "attend_backward") else coterie.outputs
    return Contender(name, getattr(coterie, call), coterie.pairs, outputs)


def dense_pairs(tokens, causal):
    return HEADS * (tokens * (tokens + 1) // 2 if causal else tokens * tokens)


def window_pairs(tokens, window):
    window = min(window, tokens)
    return HEADS * (window * (window + 1) // 2 + (tokens - window) * window)


def onnx_contender(data, operator, expected, causal=True, window=0):
    """MultiHeadAttention or GroupQueryAttention of com.microsoft as a model of one node."""
    if not onnxruntime:
        return []
    tokens = len(data.q)
    helper, proto = onnx.helper, onnx.TensorProto

    def value(name, shape):
        return helper.make_tensor_value_info(name, proto.FLOAT, shape)

    inputs, outputs, constants = list("qkv"), [value("out", [1, tokens, COLUMNS])], []
    attributes = {"num_heads": HEADS}
    if operator == "GroupQueryAttention":
        inputs += ["", "", "last", "total"]  # no past keys and values
        constants = [
            helper.make_tensor("last", proto.INT32, [1], [tokens - 1]),
            helper.make_tensor("total", proto.INT32, [], [tokens]),
        ]
        outputs += [value(name, [1, HEADS, tokens, WIDTH]) for name in ("present_k", "present_v")]
        attributes["kv_num_heads"] = HEADS
        if window:
            attributes["local_window_size"] = window
    else:
        attributes["unidirectional"] = int(causal)
    node = helper.make_node(operator, inputs, [o.name for o in outputs], domain="com.microsoft", **attributes)
    graph = helper.make_graph([node], operator, [value(name, [1, tokens, COLUMNS]) for name in "qkv"], outputs, constants)
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=9)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    # Values may share the arrays' memory: whoever holds the contender holds the arrays.
    arrays = {name: getattr(data, name)[None] for name in "qkv"}
    arrays.update((o.name, np.zeros([d.dim_value for d in o.type.tensor_type.shape.dim], np.float32)) for o in outputs)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    for name in "qkv":
        binding.bind_ortvalue_input(name, values[name])
    for output in outputs:
        binding.bind_ortvalue_output(output.name, values[output.name])

    name = {"MultiHeadAttention": "onnxruntime MHA", "GroupQueryAttention": "onnxruntime GQA"}[operator]
    if operator == "MultiHeadAttention" and causal:
        name += " unidirectional"
    if window:
        name += f" window {window}"
    pairs = window_pairs(tokens, window) if window else dense_pairs(tokens, causal)

    def call():
        session.run_with_iobinding(binding)

    def outputs_copied():
        return [values["out"].numpy()[0].copy()]

    return [Contender(name, call, lambda: pairs, outputs_copied, expected, "onnxruntime", keep=arrays)]


def torch_dense(data, causal, expected):
    """PyTorch's own function, and its formula by hand into buffers made once: whichever is faster."""
    if not torch:
        return []
    q, k, v = (data.torch(name) for name in "qkv")
    tokens = q.shape[2]
    functional = torch.nn.functional
    last = []

    def library():
        with torch.no_grad():
            if hasattr(functional, "scaled_dot_product_attention"):
                last[:] = [functional.scaled_dot_product_attention(q, k, v, is_causal=causal)]
            else:
                last[:] = [functional._scaled_dot_product_attention(q, k, v, is_causal=causal)[0]]

    scores = torch.empty(HEADS, tokens, tokens)
    out = torch.empty(HEADS, tokens, WIDTH)
    mask = torch.full((tokens, tokens), -float("inf")).triu(1) if causal else scores

    def by_hand():
        with torch.no_grad():
            torch.baddbmm(mask, q[0], k[0].transpose(1, 2), beta=int(causal), alpha=WIDTH**-0.5, out=scores)
            torch.softmax(scores, -1, out=scores)
            torch.bmm(scores, v[0], out=out)

    pairs = dense_pairs(tokens, causal)
    underscore = "" if hasattr(functional, "scaled_dot_product_attention") else "_"
    return [
        Contender(f"torch {underscore}scaled_dot_product_attention", library, lambda: pairs, lambda: [by_token(last[0])], expected, "torch"),
        Contender("torch baddbmm, softmax, bmm", by_hand, lambda: pairs, lambda: [by_token(out)], expected, "torch"),
    ]


def torch_training(name, package, data, forward, pairs, expected, shared=False, after=None):
    """forward(q, k, v) gives the output and, or None, a loss of its own; then backward, and after()."""
    q, v = data.torch("q", True), data.torch("v", True)
    k = q if shared else data.torch("k", True)
    leaves = [q, v] if shared else [q, k, v]
    d_out = data.torch("d_out")
    last = []

    def call():
        for leaf in leaves:
            leaf.grad = None
        out, loss = forward(q, k, v)
        if loss is None:
            out.backward(d_out)
        else:
            torch.autograd.backward([out, loss], [d_out, None])
        if after:
            after()
        last[:] = [out]

    def outputs():
        return [by_token(last[0]), *[by_token(leaf.grad) for leaf in leaves]]

    return Contender(name, call, pairs, outputs, expected, package)


def torch_dense_training(data, causal, expected):
    if not torch:
        return []
    functional = torch.nn.functional
    underscore = "" if hasattr(functional, "scaled_dot_product_attention") else "_"

    def forward(q, k, v):
        if not underscore:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=causal), None
        return functional._scaled_dot_product_attention(q, k, v, is_causal=causal)[0], None

    pairs = dense_pairs(len(data.q), causal)
    return [torch_training(f"torch {underscore}scaled_dot_product_attention", "torch", data, forward, lambda: pairs, expected)]


def local_contenders(data, window, expected, training=False):
    """LocalAttention in its exact mode, where a query sees one key more than the window, in blocks of several sizes."""
    if not local_attention:
        return []
    tokens = len(data.q)
    result = []
    for blocks in (1, 2, 4):
        module = local_attention.LocalAttention(
            window // blocks, causal=True, look_backward=blocks, exact_windowsize=True, use_rotary_pos_emb=False
        )
        name = f"local-attention {window // blocks}, look_backward {blocks}"
        pairs = window_pairs(tokens, window + 1)
        if training:
            result.append(
                torch_training(name, "local-attention", data, lambda q, k, v, m=module: (m(q, k, v), None), lambda: pairs, expected)
            )
            continue
        last = []

        def call(module=module, last=last):
            with torch.no_grad():
                last[:] = [module(data.torch("q"), data.torch("k"), data.torch("v"))]

        result.append(
            Contender(name, call, lambda: pairs, lambda last=last: [by_token(last[0])], expected, "local-attention")
        )
    return result


def routing_contender(data, window, causal, shared, coterie, training):
    """KmeansAttention with centroids at the data's centres; `coterie` has computed the same with the call timed here."""
    if not routing_transformer:
        return []
    clusters = data.centres.shape[1]
    module = routing_transformer.KmeansAttention(clusters, window, HEADS, WIDTH, causal=causal, shared_qk=shared)
    with torch.no_grad():
        module.kmeans.means.copy_(torch.from_numpy(data.centres))
        module.kmeans.initted.fill_(True)
        for learned in (module.mem_key, module.mem_value):
            learned.zero_()
    module.train(training)

    def pairs():
        """Of the members that the package itself selects."""
        with torch.no_grad():
            q, k = data.torch("q"), data.torch("k")
            tokens = q.shape[2]
            dists = module.kmeans(q if shared else torch.cat((q, k), dim=2))[0]
            members = routing_transformer.distribution(dists[:, :, :tokens], window).numpy().reshape(-1, window)
            keys = members if shared else routing_transformer.distribution(dists[:, :, tokens:], window).numpy().reshape(-1, window)
        if not causal:
            return members.size * window
        seen = [np.searchsorted(np.sort(b), a, side="right") for a, b in zip(members, keys)]
        return int(sum((np.maximum(s - 1, 1) if shared else s).sum() for s in seen))

    def expected():
        arrays = coterie.outputs_and_gradients() if training else coterie.outputs()
        if causal and not shared:  # the key of zeros has logit 0 and takes its share of every softmax
            if not training:
                coterie.attend_backward()
            lse = coterie.log_sum_exp().astype(np.float64)
            share = np.repeat(1 / (1 + np.exp(-lse)), WIDTH, axis=1)
            # Its gradients are other ones: only the output is compared.
            return [arrays[0] * share]
        return arrays

    def compared(arrays):
        if training and shared:  # Coterie's rows are normalised for the queries as well: what that leaves of the gradient
            x, d_x = (by_head(a).astype(np.float64) for a in (data.q, arrays[1]))
            unit = unit_rows(x)
            d_x = d_x - d_x.mean(-1, keepdims=True) - unit * (unit * d_x).sum(-1, keepdims=True)
            arrays[1] = d_x.transpose(1, 0, 2).reshape(-1, COLUMNS)
        return arrays[:1] if causal and not shared else arrays

    name = "routing-transformer " + ("shared_qk" if shared else "q, k") + (" causal" if causal else "")
    if training:
        contender = torch_training(name, "routing-transformer", data, module, pairs, expected, shared, module.kmeans.update)
        outputs = contender.outputs
        contender.outputs = lambda: compared(outputs())
        return [contender]
    last = []

    def call():
        with torch.no_grad():
            q = data.torch("q")
            last[:] = [module(q, q if shared else data.torch("k"), data.torch("v"))[0]]

    return [Contender(name, call, pairs, lambda: compared([by_token(last[0])]), expected, "routing-transformer")]


# ------------------------------------------------------------------------------------------------------------------- cases


@dataclass
class Bar:
    """Coterie's row `ours` must be `bar` times as fast as the fastest row of `packages`."""

    text: str
    bar: float
    packages: tuple = ()  # empty: all others
    ours: int = 0


@dataclass
class Case:
    name: str
    tokens: int
    operations: int  # useful, per pair
    make: Callable  # the contenders, Coterie's first
    seconds: float = 20  # of rounds
    bars: list = field(default_factory=list)
    contenders: list = field(default_factory=list)
    peak: float = 0  # multiply-adds of this core, operations per second


def dense_case(tokens, causal, training):
    def make():
        data = random_data(tokens)
        coterie = Coterie(data, DENSE, causal)
        if training:
            return [of_coterie("Coterie", coterie, "train")] + torch_dense_training(data, causal, coterie.outputs_and_gradients)
        contenders = [of_coterie("Coterie", coterie)]
        contenders += onnx_contender(data, "MultiHeadAttention", coterie.outputs, causal)
        if causal:
            contenders += onnx_contender(data, "GroupQueryAttention", coterie.outputs)
        return contenders + torch_dense(data, causal, coterie.outputs)

    shape = f"n={tokens}, " + ("causal" if causal else "not causal")
    what = "forward and backward" if training else "forward"
    bars = [] if training else [Bar(f"dense {what}, {shape}: the best", 1)]
    return Case(f"dense {what}, {shape}", tokens, BACKWARD if training else FORWARD, make, bars=bars)


def local_case(tokens, window, training):
    def make():
        data = random_data(tokens)
        coterie = Coterie(data, LOCAL, True, window)
        one_more = Coterie(data, LOCAL, True, window + 1)
        if training:
            one_more.train()
            expected = one_more.outputs_and_gradients
            return [of_coterie("Coterie", coterie, "train")] + local_contenders(data, window, expected, True)
        one_more.forward()
        dense = Coterie(data, DENSE, True)
        dense.forward()
        contenders = [of_coterie("Coterie", coterie)]
        contenders += onnx_contender(data, "GroupQueryAttention", coterie.outputs, window=window)
        contenders += onnx_contender(data, "GroupQueryAttention", dense.outputs)
        return contenders + local_contenders(data, window, one_more.outputs)

    what = "forward and backward" if training else "forward"
    bars = [] if training else [Bar(f"local forward, n={tokens}, w={window}, causal: the best", 6)]
    return Case(f"local {what}, n={tokens}, w={window}, causal", tokens, BACKWARD if training else FORWARD, make, bars=bars)


def default_routed(tokens, window, causal, shared):
    clusters = 2 * tokens // window
    data = ClusteredData(tokens, clusters, False, shared)
    return Coterie(data, ROUTED, causal, window, clusters, shared, data.centroids()), f"Coterie k={clusters}"


def routed_dense_case(tokens, window):
    def make():
        routed, name = default_routed(tokens, window, True, True)
        data = random_data(tokens)
        dense = Coterie(data, DENSE, True)
        contenders = [of_coterie(f"{name}, routing included", routed), of_coterie("Coterie dense", dense)]
        contenders += onnx_contender(data, "GroupQueryAttention", dense.outputs)
        if not ARGUMENTS.quick:
            two_sided = Coterie(data, DENSE, False)
            two_sided.forward()
            contenders += onnx_contender(data, "MultiHeadAttention", two_sided.outputs, causal=False)
        return contenders

    text = f"routed forward, n={tokens}, w={window}, causal, routing included: the best dense"
    # Two rounds, for a dense call takes seconds.
    return Case(f"routed forward against dense, n={tokens}, w={window}, causal", tokens, FORWARD, make, 40, [Bar(text, 25, ("onnxruntime",))])


def routed_case(tokens, window, causal, shared, training, barred):
    clusters = tokens // window

    def make():
        routed, name = default_routed(tokens, window, causal, shared)
        data = ClusteredData(tokens, clusters, True, shared)
        # Two-sided, Coterie's window is centred on the query; the package's is the cluster, which here has w tokens: no cap.
        same = Coterie(data, ROUTED, causal, window if causal else 0, clusters, shared, data.centroids())
        whole, alone = ("train", "attend_backward") if training else ("forward", "attend")
        same_name = f"Coterie k={clusters}, {window} tokens each"
        return [
            of_coterie(f"{name}, routing included", routed, whole),
            of_coterie(f"{name}, along a given plan", routed, alone),
            of_coterie(f"{same_name}, routing included", same, whole),
            of_coterie(f"{same_name}, along a given plan", same, alone),
        ] + routing_contender(data, window, causal, shared, same, training)

    what = "forward and backward" if training else "forward"
    kind = ("causal" if causal else "not causal") + (", shared queries and keys" if shared else ", queries and keys")
    shape = f"n={tokens}, w={window}, {kind}"
    bars = []
    if barred:
        for ours, text in ((0, f"k={2 * clusters}"), (2, f"k={clusters}, same pairs")):
            bars.append(
                Bar(f"routed {what}, {shape}, {text}: routing-transformer", 4 if training else 7, ("routing-transformer",), ours)
            )
    return Case(f"routed {what}, {shape}", tokens, BACKWARD if training else FORWARD, make, bars=bars)


def all_cases():
    cases = [dense_case(n, causal, False) for n in (1024, 4096) for causal in (False, True)]
    cases += [dense_case(n, causal, True) for n in ((1024,) if ARGUMENTS.quick else (1024, 4096)) for causal in (False, True)]
    cases += [local_case(8192, 256, training) for training in (False, True)]
    cases.append(routed_dense_case(16384, 256))
    for training in (False, True):
        cases.append(routed_case(16384, 256, True, True, training, True))
        if not ARGUMENTS.quick:
            cases.append(routed_case(16384, 256, True, False, training, False))
            cases.append(routed_case(16384, 256, False, False, training, False))
    return [case for case in cases if ARGUMENTS.only in case.name]


# --------------------------------------------------------------------------------------------------------------- measuring


class Progress:
    """One line that is overwritten, or where there is no terminal a line every ten seconds."""

    def __init__(self, cases):
        self.cases, self.terminal, self.shown = cases, sys.stderr.isatty(), 0.0

    def show(self, index, contender, step, seconds_left):
        later = sum(case.seconds * 1.5 for case in self.cases[index + 1 :])
        left = seconds_left + later
        text = f"case {index + 1} of {len(self.cases)}, {step}: {contender}, about {left / 60:.1f} min left"
        if self.terminal:
            print(f"\r\033[K{text[:118]}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.shown > 10:
            print(text, file=sys.stderr, flush=True)
            self.shown = time.monotonic()

    def clear(self):
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def timed(contender):
    """CPU seconds of this thread, and whether other threads of the process computed meanwhile."""
    process, thread = time.process_time(), time.thread_time()
    contender.call()
    thread, process = time.thread_time() - thread, time.process_time() - process
    return thread, process - thread > 0.05 * thread + 0.002


def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def compare(contender):
    """The largest difference, relative to the largest number of its array."""
    worst = 0.0
    for got, want in zip(contender.outputs(), contender.expected(), strict=True):
        assert got.shape == want.shape, (got.shape, want.shape)
        difference = np.abs(got - want).max() / np.abs(want).max()
        worst = max(worst, difference if np.isfinite(difference) else np.inf)
    return float(worst)


def run(case, index, progress):
    progress.show(index, "preparing", "data", case.seconds * 1.5)
    contenders = case.make()
    estimates = []
    for contender in list(contenders):
        progress.show(index, contender.name, "first call and check", case.seconds * 1.5)
        try:
            seconds = timed(contender)[0]
            if contender.expected:
                contender.difference = compare(contender)
                if not contender.difference < 1e-4:
                    raise RuntimeError(f"its result differs from Coterie's by {contender.difference:.1e}")
            # Of a long one the first call will do as an estimate; others go on until the heap has the shape that they need.
            faults = 1000
            for _ in range(6):
                if seconds > 3 or faults < 1000:
                    break
                faults = page_faults()
                seconds = timed(contender)[0]
                faults = page_faults() - faults
            estimates.append(seconds)
        except Exception as error:  # noqa: BLE001  whatever a package raises
            if not contender.expected:
                raise
            progress.clear()
            say(f"{contender.name} is not timed in '{case.name}': {str(error).splitlines()[0]}")
            contenders.remove(contender)

    rounds = int(max(1 if ARGUMENTS.quick else 2, min(25, case.seconds / sum(estimates))))
    times = [[] for _ in contenders]
    for turn in range(rounds):
        case.peak = max(case.peak, LIBRARY.peer_fma_peak())
        for number, contender in enumerate(contenders):
            left = (rounds - turn) * sum(estimates) - sum(estimates[:number])
            progress.show(index, contender.name, f"round {turn + 1} of {rounds}", left)
            spent, others = timed(contender)
            times[number].append(spent)
            contender.other_threads |= others
    for contender, spent in zip(contenders, times):
        contender.least, contender.median, contender.rounds = min(spent), statistics.median(spent), len(spent)
        contender.pairs = contender.pairs()
        contender.call = contender.outputs = contender.expected = contender.keep = None  # their arrays can go
    case.contenders = contenders
    progress.clear()


# --------------------------------------------------------------------------------------------------------------- reporting


def print_case(case):
    print(f"\n{case.name}   ({HEADS} heads, d={WIDTH}, peak {1e-9 * case.peak:.0f} GFLOP/s)")
    print(f"  {'':50}{'keys':>8}{'least ms':>10}{'median':>10}{'GFLOP/s':>9}{'of peak':>9}{'ratio':>7}{'rounds':>8}{'difference':>12}")
    first = case.contenders[0].least
    for c in case.contenders:
        rate = case.operations * c.pairs / c.least
        difference = "" if c.difference is None else f"{c.difference:.0e}"
        note = "   also computes on other threads" if c.other_threads else ""
        print(
            f"  {c.name:50}{c.pairs / case.tokens / HEADS:8.1f}{1e3 * c.least:10.1f}{1e3 * c.median:10.1f}{1e-9 * rate:9.1f}"
            f"{rate / case.peak:9.2f}{c.least / first:7.2f}{c.rounds:8}{difference:>12}{note}"
        )
    sys.stdout.flush()


def print_bars(cases):
    rows = []
    for case in cases:
        for bar in case.bars:
            rivals = [
                c
                for c in case.contenders
                if c.package != "coterie" and not c.other_threads and (not bar.packages or c.package in bar.packages)
            ]
            if not rivals:
                rows.append({"text": bar.text, "bar": bar.bar, "measured": None})
                continue
            best = min(rivals, key=lambda c: c.least)
            ours = case.contenders[bar.ours]
            rows.append(
                {
                    "text": bar.text,
                    "bar": bar.bar,
                    "measured": best.least / ours.least,
                    "rival": best.name,
                    "keys": [c.pairs / case.tokens / HEADS for c in (ours, best)],
                }
            )
    if not rows:
        return rows
    print("\nhow many times as fast Coterie is, by least times")
    width = max(len(row["text"]) for row in rows)
    for row in rows:
        if row["measured"] is None:
            print(f"  {row['text']:{width}}  bar {row['bar']:4.0f}   not measured: no such package here")
            continue
        keys = row["keys"]
        same = "" if abs(keys[0] - keys[1]) < 0.02 * keys[1] else f", keys per query {keys[0]:.0f} against {keys[1]:.0f}"
        verdict = "met   " if row["measured"] >= row["bar"] else "missed"
        print(f"  {row['text']:{width}}  bar {row['bar']:4.0f}   measured {row['measured']:6.2f}   {verdict}  ({row['rival']}{same})")
    return rows


def processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions():
    lines = {"Coterie": LIBRARY.peer_build().decode(), "machine": f"{processor()}, one thread, {PINNED}"}
    if onnxruntime:
        lines["onnxruntime"] = onnxruntime.__version__
    if torch:
        capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")() if hasattr(torch.backends, "cpu") else ""
        lines["torch"] = ", ".join(filter(None, (torch.__version__, capability, blas_of_torch())))
    if local_attention:
        lines["local-attention"] = package_version("local-attention")
    if routing_transformer:
        lines["routing-transformer"] = package_version("routing-transformer")
    return lines


def main():
    lines = versions()
    for name, text in lines.items():
        print(f"{name:20} {text}")
    cases = all_cases()
    if ARGUMENTS.quick:
        for case in cases:
            case.seconds /= 10
    progress = Progress(cases)
    for index, case in enumerate(cases):
        run(case, index, progress)
        print_case(case)
    rows = print_bars(cases)
    if ARGUMENTS.json:
        result = {
            "versions": lines,
            "bars": rows,
            "cases": [
                {
                    "name": case.name,
                    "fma_peak": case.peak,
                    "contenders": [
                        {
                            "name": c.name,
                            "pairs": c.pairs,
                            "least_seconds": c.least,
                            "median_seconds": c.median,
                            "rounds": c.rounds,
                            "useful_flops": case.operations * c.pairs / c.least,
                            "difference": c.difference,
                            "other_threads": c.other_threads,
                        }
                        for c in case.contenders
                    ],
                }
                for case in cases
            ],
        }
        with open(ARGUMENTS.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
        say(f"wrote {ARGUMENTS.json}")


main()
