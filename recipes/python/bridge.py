"""The warmed Python of a fork: answers `eval`, and becomes itself when the agent says who it is.

The agent speaks with it in lines of JSON over standard input and output; docs/recipes.md describes them. The bridge
takes both for itself: user code finds an empty standard input, and what it prints is part of the answer while it
runs, and goes to the log of the runtime otherwise.

What happens at the `identity` event may be on the critical path of a fork. The work is done before, at `quiesce`: that
finds every generator, and rehearses the event. The event itself imports nothing and searches nothing. Where it has only
generators to refresh whose memory is known, the agent does so while this process is frozen.
"""

import ast
import gc
import io
import json
import linecache
import os
import random
import signal
import sys
import traceback
import types

LINE_LIMIT = 4 << 20  # bytes, both directions; the agent refuses more
OUTPUT_LIMIT = 512 << 10  # of each captured stream
TEXT_LIMIT = 64 << 10  # of repr, message and stack
ARRAY_LIMIT = 1_000_000  # elements of one numpy array that is answered as a value

PID = os.getpid()
HERE = __file__


# --- the protocol ----------------------------------------------------------------------------------------------------


def take_standard_streams():
    """Moves the protocol to private descriptors that no child inherits; returns (input, output)."""
    import fcntl

    source = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 200)
    target = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 200)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return source, target


class Lines:
    """Whole lines from a descriptor."""

    def __init__(self, descriptor, event):
        self.descriptor = descriptor
        self.pending = b""
        self.event = event  # is offered what was read in one piece and begins as an identity request

    def next(self):
        """The next line without its end, or None at the end of input or after a line over the limit."""
        while True:
            line, end, rest = self.pending.partition(b"\n")
            if end:
                self.pending = rest
                return line
            if len(self.pending) > LINE_LIMIT:
                return None
            more = os.read(self.descriptor, 1 << 16)
            if not more:
                return None
            if not self.pending and more.startswith(IDENTITY) and self.event(more):
                continue
            self.pending += more


def send(descriptor, data):
    view = memoryview(data + b"\n")
    while view:
        view = view[os.write(descriptor, view) :]


# --- what user code prints -------------------------------------------------------------------------------------------


class Output(io.RawIOBase):
    """The raw end of sys.stdout or sys.stderr: into the answer while an evaluation runs, into the log otherwise."""

    def __init__(self, descriptor):
        self.descriptor = descriptor
        self.captured = None
        self.lost = 0

    def writable(self):
        return True

    def fileno(self):
        return self.descriptor

    def write(self, data):
        captured = self.captured
        size = len(data)
        if captured is None:
            return os.write(self.descriptor, data)
        room = OUTPUT_LIMIT - len(captured)
        if size > room:
            self.lost += size - max(room, 0)
            data = bytes(data)[: max(room, 0)]
        captured += data
        return size

    def start(self):
        self.captured, self.lost = bytearray(), 0

    def stop(self):
        captured, self.captured = self.captured, None
        text = captured.decode("utf-8", "backslashreplace")
        if self.lost:
            text += "\n[%d more bytes were printed]\n" % self.lost
        return text


def text_stream(raw):
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", write_through=True)


RAW_OUT, RAW_ERR = Output(1), Output(2)
STDOUT, STDERR = text_stream(RAW_OUT), text_stream(RAW_ERR)


def flush():
    for stream in (STDOUT, STDERR):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # user code closed it: what it held is gone


# --- evaluation ------------------------------------------------------------------------------------------------------


class TooLarge(Exception):
    """The value does not fit into an answer."""


def json_form(value):
    """Numpy's scalars and arrays as Python's; anything else has no JSON form."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        if getattr(value, "size", 1) > ARRAY_LIMIT:
            raise TooLarge("an array of %d elements; at most %d can be answered" % (value.size, ARRAY_LIMIT))
        return value.tolist()
    raise TypeError


# NaN and the infinities stay as they are: JSON has no word for them, and null would be a lie.
ENCODE = json.JSONEncoder(ensure_ascii=False, default=json_form).encode
ENCODE_TEXT = json.JSONEncoder(ensure_ascii=True).encode


def clean(text, limit):
    """Text that has a UTF-8 form, cut to a limit."""
    if len(text) > limit:
        text = text[:limit] + "…"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def describe(value):
    try:
        return clean(repr(value), TEXT_LIMIT)
    except Exception as error:
        return "<%s without repr: %s>" % (type(value).__name__, type(error).__name__)


def value_json(value):
    try:
        text = ENCODE(value)
        text.encode("utf-8")
        return text
    except TooLarge:
        raise
    except Exception:
        return "null"  # no JSON form: its repr speaks for it


class Interruptible:
    """Whether SIGINT may raise KeyboardInterrupt: only while user code runs, never in the bridge itself."""

    now = False


def on_interrupt(_number, _frame):
    if Interruptible.now:
        raise KeyboardInterrupt("the request was interrupted")


def run(code, name, scope):
    """Executes code; returns (has a value, the value of its last expression)."""
    tree = ast.parse(code, name, "exec")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    Interruptible.now = True
    try:
        if tree.body:
            exec(compile(tree, name, "exec", dont_inherit=True), scope)
        if last is None:
            return False, None
        return True, eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), scope)
    finally:
        Interruptible.now = False


def failure(error, name, code):
    """(message, stack) of an exception; the stack shows the user's frames only."""
    if len(linecache.cache) > 500:
        linecache.cache.clear()
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    try:
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == HERE:
            frames = frames.tb_next
        if isinstance(error, SyntaxError) and error.filename == name:
            frames = None
        kind = type(error)
        message = "".join(traceback.format_exception_only(kind, error)).strip()
        if isinstance(error, SyntaxError):
            message = message.splitlines()[-1]
        stack = "".join(traceback.format_exception(kind, error, frames))
    except Exception:
        message = stack = type(error).__name__
    return clean(message, TEXT_LIMIT), clean(stack, TEXT_LIMIT)


def evaluate(number, code, scope):
    """The answer to one request, as the bytes of a line."""
    name = "<eval %d>" % number
    RAW_OUT.start()
    RAW_ERR.start()
    try:
        try:
            has_value, value = run(code, name, scope)
            body = '"value":%s,"repr":%s' % (
                value_json(value),
                ENCODE_TEXT(describe(value) if has_value else ""),
            )
            kind = "result"
        except TooLarge as error:
            body, kind = '"kind":"too-large","message":%s,"stack":""' % ENCODE_TEXT(str(error)), "error"
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: the runtime outlives its requests
            message, stack = failure(error, name, code)
            body, kind = '"message":%s,"stack":%s' % (ENCODE_TEXT(message), ENCODE_TEXT(stack)), "error"
        flush()
    finally:
        out, err = RAW_OUT.stop(), RAW_ERR.stop()
    if os.getpid() != PID:
        os._exit(0)  # user code forked, and this is the child: the answer is the parent's
    line = answer(kind, number, body, out, err)
    if len(line) > LINE_LIMIT:
        body = '"kind":"too-large","message":"the answer has %d bytes; at most %d are sent","stack":""' % (
            len(line),
            LINE_LIMIT,
        )
        line = answer("error", number, body, out[:TEXT_LIMIT], err[:TEXT_LIMIT])
    return line


def answer(kind, number, body, out, err):
    return (
        '{"type":"%s","id":%d,%s,"stdout":%s,"stderr":%s}' % (kind, number, body, ENCODE_TEXT(out), ENCODE_TEXT(err))
    ).encode("utf-8")


# --- identity --------------------------------------------------------------------------------------------------------

guest = types.ModuleType("offshoot_guest", "Who this fork is, and a way to be told.")
guest.fork = None
guest.callbacks = []


def on_identity(callback):
    """Calls `callback(fork)` in every fork before its first request, to refresh state that only you know of."""
    guest.callbacks.append(callback)
    return callback


guest.on_identity = on_identity


class Gathered:
    """What the identity event has to refresh. Filled at quiesce, dropped after the event."""

    randoms = []  # random.Random and its subclasses
    sequences = []  # numpy SeedSequence: a generator spawns its children from one
    generators = []  # (numpy BitGenerator, its class)
    legacy = []  # numpy RandomState, with the normal deviate it keeps for next time
    foreign = []  # numpy RandomState over a generator that is not Mersenne's
    resets = []  # (dictionary, key, value)
    add_openssl = None
    slow = True  # whether any of these has to be refreshed by its own functions
    report = ""  # its entries of the report, as members of a JSON object
    answer = b""  # all entries that are known beforehand
    environment = set()  # names that the last event set


class Direct:
    """The memory of generators' states. One system call fills all of it with random bytes: a fork has to translate every
    instruction before it can run it, and the seeding of Python's and numpy's generators has many. Only what was found
    to lie where it should is here."""

    states = []  # writable memory that takes any random bytes
    owners = []  # the objects it belongs to, so that it stays theirs
    size = 0
    zeros = []  # flags that say that half of a draw was kept for next time
    sequences = []  # (SeedSequence, the array that is its entropy)
    source = -1  # /dev/urandom


def fresh():
    return int.from_bytes(os.urandom(32), "little")


def gather():
    """Finds all live generators."""
    modules = sys.modules
    Gathered.add_openssl = getattr(modules.get("_ssl"), "RAND_add", None)
    Gathered.resets = resets = []
    if "tempfile" in modules:
        resets.append((vars(modules["tempfile"]), "_name_sequence", None))
    if "uuid" in modules:
        names = vars(modules["uuid"])
        # The node is made from `random` when it is asked for, and marked as such (RFC 4122, 4.5); libuuid would keep
        # node and sequence of the template.
        names["_GETTERS"] = [modules["uuid"]._random_getnode]
        resets += [(names, "_last_timestamp", None), (names, "_node", None), (names, "_generate_time_safe", None)]
    if "platform" in modules:
        resets.append((vars(modules["platform"]), "_uname_cache", None))
    numpy = modules.get("numpy.random")
    randoms, sequences, bits, states = [], [], [], []
    # Types are compared, not isinstance: that would run the code of proxies.
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, random.Random):
            if not issubclass(kind, random.SystemRandom):
                randoms.append(thing)
        elif numpy is not None:
            if issubclass(kind, numpy.BitGenerator):
                bits.append(thing)
            elif issubclass(kind, numpy.SeedSequence):
                sequences.append(thing)
            elif issubclass(kind, numpy.RandomState):
                states.append(thing)
    Gathered.randoms, Gathered.sequences = randoms, sequences
    Gathered.generators, Gathered.legacy, Gathered.foreign = [], [], []
    seeded = set()
    for state in states:
        if type(state._bit_generator) is numpy.MT19937:
            Gathered.legacy.append(state)
            seeded.add(id(state._bit_generator))
        else:
            Gathered.foreign.append(state)
    Gathered.generators = [(thing, type(thing)) for thing in bits if id(thing) not in seeded]


def count():
    """The entries of the report, by what was gathered."""
    report = {"random": "reseeded-%d" % len(Gathered.randoms)}
    generators = len(Gathered.generators) + len(Gathered.legacy)
    if generators or Gathered.sequences:
        report["numpy"] = "reseeded-%d" % generators
    if Gathered.add_openssl is not None:
        report["openssl"] = "stirred"
    if "uuid" in sys.modules:
        report["uuid"] = "reset"
    return report


def reseed():
    """Refreshes what is gathered and has no direct way."""
    for one in Gathered.randoms:
        one.seed(fresh())
    for sequence in Gathered.sequences:
        sequence.__init__(None, pool_size=sequence.pool_size)
    for one, kind in Gathered.generators:
        one.state = kind().state
    for state in Gathered.legacy:
        state.seed()
    for state in Gathered.foreign:
        whole = state.get_state(legacy=False)
        whole["has_gauss"] = 0
        state.set_state(whole)
    if Gathered.add_openssl is not None:
        # Stirs OpenSSL's primary generator; those of the threads notice and reseed from it.
        Gathered.add_openssl(os.urandom(48), 48.0)


def refresh():
    """The event's part that the ack waits for. It imports nothing, and calls little."""
    if Direct.size:
        # A signal may cut the read short.
        while os.readv(Direct.source, Direct.states) != Direct.size:
            pass
    if Gathered.slow:
        reseed()


def settle():
    """The part that no request may miss. The quiesce did it too: it finds something to do only where a thread was at work
    after that, and so the ack need not wait for it."""
    for dictionary, key, value in Gathered.resets:
        dictionary[key] = value
    for flag in Direct.zeros:
        flag[0] = 0
    for sequence, entropy in Direct.sequences:
        if sequence.entropy is not entropy:  # it was initialized anew since the quiesce
            sequence.__init__(None, pool_size=sequence.pool_size)


def drop_stubborn():
    """Rehearses each generator alone; returns how many cannot be reseeded."""
    stubborn = 0
    for group, attempt in (
        (Gathered.randoms, lambda one: one.seed(fresh())),
        (Gathered.sequences, lambda one: one.__init__(None, pool_size=one.pool_size)),
        (Gathered.generators, lambda pair: setattr(pair[0], "state", pair[1]().state)),
        (Gathered.legacy, lambda one: one.seed()),
        (Gathered.foreign, lambda one: one.set_state(one.get_state(legacy=False))),
    ):
        for thing in list(group):
            try:
                attempt(thing)
            except Exception as error:
                stubborn += 1
                # By identity: == may be the user's code.
                group[:] = [other for other in group if other is not thing]
                print("cannot be reseeded in a fork: %s (%s)" % (describe(thing), error), file=STDERR)
    return stubborn


def memory_at(address, size):
    """A writable view of memory."""
    import ctypes

    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def random_state(one):
    """The state of a random.Random, if it lies where CPython puts it, and what to reset beside it."""
    kind = type(one)
    if kind.seed is not random.Random.seed or kind.random is not random.Random.random:
        return None
    state = super(random.Random, one).getstate()
    view = memory_at(id(one) + object.__basicsize__, 4 * 625)  # the index, then 624 words
    words = view.cast("I").tolist()
    if words != [state[-1], *state[:-1]] or "gauss_next" not in vars(one):
        return None
    return view[4:], (vars(one), "gauss_next", None)


def bits_state(one, kind):
    """The state of a numpy bit generator and its flags, if they lie where numpy puts them."""
    numpy = sys.modules["numpy.random"]
    state = one.state
    if kind is numpy.MT19937:
        key = state["state"]["key"].tobytes()
        view = memory_at(one.ctypes.state_address, len(key))
        return (view, []) if len(key) == 2496 and view == key else None
    if kind in (numpy.PCG64, numpy.PCG64DXSM):
        outer = memory_at(one.ctypes.state_address, 16)  # a pointer, has_uint32, uinteger
        inner = memory_at(outer.cast("Q")[0], 32)  # state and increment, which is odd and stays
        expected = state["state"]["state"] | state["state"]["inc"] << 128
        rest = [state["has_uint32"], state["uinteger"]]
        if int.from_bytes(inner, "little") == expected and outer.cast("I").tolist()[2:] == rest:
            return inner[:16], [outer[8:12].cast("I")]
    return None


def gauss_flag(state):
    """The flag of a RandomState that says that it keeps a normal deviate."""
    import struct

    whole = state.get_state(legacy=False)
    memory = memory_at(id(state), type(state).__basicsize__)
    whole["has_gauss"], whole["gauss"] = 1, 0.7071067811865476
    state.set_state(whole)
    at = bytes(memory).find(struct.pack("d", whole["gauss"])) - 8
    found = at >= 16 and memory[at : at + 4].cast("I")[0] == 1
    whole["has_gauss"], whole["gauss"] = 0, 0.0
    state.set_state(whole)
    flag = memory[at : at + 4].cast("I") if found else None
    return flag if found and flag[0] == 0 else None


def own_entropy(sequence):
    """Gives a SeedSequence entropy, and a pool, that can be written to."""
    numpy = sys.modules["numpy"]
    if type(sequence) is not numpy.random.SeedSequence:
        return None
    entropy = numpy.frombuffer(os.urandom(32), numpy.uint32).copy()
    sequence.__init__(entropy, pool_size=sequence.pool_size)
    if sequence.entropy is not entropy or not sequence.pool.flags.c_contiguous or sequence.pool is not sequence.pool:
        return None
    return entropy, memoryview(sequence.pool).cast("B")


def find_direct():
    """Moves what has a direct way from Gathered to Direct."""
    states, owners, zeros, sequences = [], [], [], []

    def move(group, attempt):
        for thing in list(group):
            try:
                found = attempt(thing)
            except Exception:
                found = None
            if found is not None:
                owners.append(thing)
                group[:] = [other for other in group if other is not thing]

    def move_random(one):
        found = random_state(one)
        if found:
            states.append(found[0])
            Gathered.resets.append(found[1])
        return found

    def move_bits(pair):
        found = bits_state(*pair)
        if found:
            states.append(found[0])
            zeros.extend(found[1])
        return found

    def move_legacy(state):
        flag = gauss_flag(state)
        found = flag and bits_state(state._bit_generator, type(state._bit_generator))
        if found:
            states.append(found[0])
            zeros.append(flag)
        return found

    def move_foreign(state):
        flag = gauss_flag(state)
        if flag is not None:
            zeros.append(flag)
        return flag

    def move_sequence(sequence):
        found = own_entropy(sequence)
        if found:
            states.extend((memoryview(found[0]).cast("B"), found[1]))
            sequences.append((sequence, found[0]))
        return found

    move(Gathered.randoms, move_random)
    move(Gathered.generators, move_bits)
    move(Gathered.legacy, move_legacy)
    move(Gathered.foreign, move_foreign)
    move(Gathered.sequences, move_sequence)
    if Direct.source < 0:
        Direct.source = os.open("/dev/urandom", os.O_RDONLY | os.O_CLOEXEC)
    if len(states) > 1000:  # the most that one call takes
        raise OSError("too many generators")
    Direct.states, Direct.owners, Direct.size = states, owners, sum(len(state) for state in states)
    Direct.zeros, Direct.sequences = zeros, sequences


def forget():
    """Lets go of the generators: user code may do so too."""
    Gathered.randoms, Gathered.sequences, Gathered.generators = [], [], []
    Gathered.legacy, Gathered.foreign, Gathered.resets = [], [], []
    Direct.states, Direct.owners, Direct.zeros, Direct.sequences, Direct.size = [], [], [], [], 0


def prepare():
    """Finds what the event refreshes, and refreshes it; returns how many generators cannot be."""
    gather()
    stubborn = drop_stubborn()
    report = count()
    try:
        import ctypes  # noqa: F401

        find_direct()
    except (ImportError, OSError):
        gather()  # without a direct way: every generator by its own functions
        drop_stubborn()
        Direct.states, Direct.owners, Direct.zeros, Direct.sequences, Direct.size = [], [], [], [], 0
    Gathered.slow = bool(
        Gathered.randoms
        or Gathered.sequences
        or Gathered.generators
        or Gathered.legacy
        or Gathered.foreign
        or Gathered.add_openssl
    )
    Gathered.report = ",".join('"%s":"%s"' % entry for entry in report.items())
    Gathered.answer = (Gathered.report + ',"environ":"set"').encode()
    return stubborn


def quiesce():
    """Prepares the event; returns the report."""
    gc.unfreeze()  # what an earlier capture froze is invisible to get_objects
    gc.collect()
    stubborn = prepare()
    rehearse_event()
    report = {"gathered": json.loads("{%s}" % Gathered.report).get("random", "none")}
    if stubborn:
        report["uncovered"] = "generators-%d" % stubborn
    more = in_place()
    flush()
    gc.collect()
    gc.freeze()  # a collection in a fork must not write to every page of the template
    return report, more


def in_place():
    """What the agent can do in this process' stead while it is frozen, so that the ack need not wait for the event: fill
    the generators' memory. None if there is more to it, which the event has to do before the ack."""
    if Gathered.slow or guest.callbacks or not expect_environment():
        return None
    import ctypes

    def place(state):
        return [ctypes.addressof(ctypes.c_char.from_buffer(state)), state.nbytes]

    return {"memory": [place(state) for state in Direct.states], "report": json.loads("{%s}" % Gathered.answer.decode())}


IDENTITY_FILES = "/run/offshoot"


class Expected(dict):
    """The data of os.environ from the quiesce until the event. The agent writes the identity directory before this process
    thaws, and whoever looks at os.environ before the event finds what stands there."""

    before = {}  # the template's


def looking(name):
    plain = getattr(dict, name)

    def method(self, *args, **kwargs):
        return plain(arrived(self), *args, **kwargs)

    return method


for _name in (
    "__getitem__ __setitem__ __delitem__ __iter__ __len__ __contains__ __repr__ __eq__ __ne__ __reversed__ __or__ __ror__ "
    "__ior__ keys items values get pop popitem setdefault update clear copy"
).split():
    setattr(Expected, _name, looking(_name))


def arrived(expected):
    """The data to use, which is a plain dictionary: the fork's, if this is one."""
    data = os.environ._data
    if data is not expected:
        return data  # another thread was first
    try:
        environment = identity_files()
    except OSError:
        return expected.before
    put_environment(environment)
    return os.environ._data


def identity_files():
    def content(path):
        with open(path, "rb", 0) as file:
            return file.read()

    environment = []
    for name in os.listdir(IDENTITY_FILES + "/env"):
        environment += [os.fsencode(name), content(IDENTITY_FILES + "/env/" + name)]
    for name in ("id", "name", "hostname", "template"):
        environment += [b"OFFSHOOT_" + name.upper().encode(), content(IDENTITY_FILES + "/" + name)]
    return environment


def expect_environment():
    """Whether os.environ is the usual one, and now looks at the identity directory."""
    if type(os.environ) is not os._Environ or os.environ._data is not os.environb._data:
        return False
    if type(os.environ._data) is Expected:
        return True  # from a capture that was given up
    if type(os.environ._data) is not dict:
        return False
    expected = Expected()
    expected.before = os.environ._data
    os.environ._data = os.environb._data = expected
    return True


def put_environment(environment):
    """Sets variables: names and values in turn, as bytes."""
    put, data = os.putenv, os.environ._data
    if type(data) is Expected:
        os.environ._data = os.environb._data = data = data.before
    at = 0
    while at < len(environment):
        name, value = environment[at], environment[at + 1]
        put(name, value)
        data[name] = value
        at += 2


def become(environment):
    """The event, as far as the ack waits for it: `environment` has names and values in turn, as bytes."""
    refresh()
    put_environment(environment)


def complete(fork, environment):
    """The rest of it, before anything is asked of this fork; returns what the callbacks add to the report."""
    settle()
    names = set(environment[::2])
    for name in Gathered.environment:
        if name not in names:
            os.environ.pop(name.decode(), None)
    Gathered.environment = names
    guest.fork = fork
    if not guest.callbacks:
        return ""
    for callback in guest.callbacks:
        callback(fork)
    return ',"callbacks":"ran-%d"' % len(guest.callbacks)


IDENTITY = b'{"type":"identity","id":'


def identity(line, reply):
    """Answers an identity request through `reply`; false, and nothing done, if the line is not in the usual form. Without
    escapes, the strings of the line are what is between its quotes."""
    parts = line.split(b'"')
    if len(parts) < 27 or parts[25] != b"env" or b"\\" in line:
        return False
    environment = parts[27:-1:2]
    become(environment)
    done = b'{"type":"done","id":' + parts[6][1:-1] + b',"report":{' + Gathered.answer
    # Callbacks may fail, or add to the report: with any, the answer waits for them.
    if not guest.callbacks:
        reply(done + b"}}\n")
    fork = {
        "id": parts[11].decode(),
        "name": parts[15].decode(),
        "hostname": parts[19].decode(),
        "template": parts[23].decode(),
    }
    more = complete(fork, environment)
    if more:
        reply(done + more.encode() + b"}}\n")
    return True


def identity_at_length(request):
    """The same from the parsed request, whatever its strings have in them."""
    environment = []
    for item in request["env"].items():
        environment += [text.encode("utf-8", "surrogateescape") for text in item]
    become(environment)
    return json.loads("{" + Gathered.answer.decode() + complete(request["fork"], environment) + "}")


def rehearse_event():
    """Runs the event until the interpreter has adapted to it, so that it need not in a fork."""
    kept, callbacks, environment = guest.fork, guest.callbacks, Gathered.environment
    guest.callbacks, Gathered.environment = [], set()
    line = IDENTITY + b'0,"fork":{"id":"","name":"","hostname":"","template":""},"env":{"OFFSHOOT_REHEARSAL":"1"}}\n'
    for _ in range(64):
        identity(line, len)
    del os.environ["OFFSHOOT_REHEARSAL"]
    guest.fork, guest.callbacks, Gathered.environment = kept, callbacks, environment


# --- the loop --------------------------------------------------------------------------------------------------------


def done(number, report, more=None):
    tail = "" if more is None else ',"in_place":' + ENCODE_TEXT(more)
    return ('{"type":"done","id":%d,"report":%s%s}' % (number, ENCODE_TEXT(report), tail)).encode("utf-8")


def handle(line, scope):
    """The answer to one line, or None."""
    request = json.loads(line)
    kind, number = request["type"], request["id"]
    if kind == "eval":
        return evaluate(number, request["code"], scope)
    try:
        if kind == "identity":
            report = identity_at_length(request)
            forget()
            return done(number, report)
        if kind == "quiesce":
            return done(number, *quiesce())
    except Exception as error:
        message, stack = failure(error, "<%s>" % kind, "")
        body = '"message":%s,"stack":%s' % (ENCODE_TEXT(message), ENCODE_TEXT(stack))
        return answer("error", number, body, "", "")
    return None


def rehearse(scope):
    """Runs the paths of a fork's first event and first request, so that their pages are in the template."""
    prepare()
    rehearse_event()
    forget()
    for code in (b"[1.5, None, 'x', {'a': 1}]", b"print('x')", b"raise ValueError(1)", b"1 +"):
        handle(b'{"type":"eval","id":0,"code":%s}' % ENCODE_TEXT(code.decode()).encode(), scope)
    guest.fork = None


def event(line, target):
    """Answers an identity request that is a whole line in the usual form; whether it did."""
    if line.find(b"\n") != len(line) - 1:
        return False

    def reply(answer):
        nonlocal answered
        answered = True
        if os.write(target, answer) != len(answer):
            sys.exit("the agent takes no answer")

    answered = False
    try:
        if not identity(line, reply):
            return False
    except Exception as error:
        if not answered:
            return False  # again, at length, to say what is wrong
        sys.exit("the identity could not be taken on: %s" % error)
    forget()
    return True


def main():
    source, target = take_standard_streams()
    signal.signal(signal.SIGINT, on_interrupt)
    user = types.ModuleType("__main__")
    user.__dict__["__builtins__"] = __builtins__
    keep_own_module = sys.modules["__main__"]
    sys.modules["__main__"], sys.modules["offshoot_guest"] = user, guest
    sys.stdout, sys.stderr, sys.stdin = STDOUT, STDERR, open(0)
    sys.argv = [""]
    scope = user.__dict__

    warm = os.environ.pop("OFFSHOOT_WARM", "")
    try:
        exec(compile(warm, "<warm>", "exec", dont_inherit=True), scope)
    except BaseException as error:
        print(failure(error, "<warm>", warm)[1], file=STDERR)
        print("the warm-up (OFFSHOOT_WARM) failed", file=STDERR)
        flush()
        return 1
    callbacks, guest.callbacks = guest.callbacks, []
    rehearse(scope)
    guest.callbacks = callbacks
    flush()

    lines = Lines(source, lambda line: event(line, target))
    send(target, b'{"type":"ready"}')
    while True:
        line = lines.next()
        if line is None:
            break
        try:
            reply = handle(line, scope)
        except (KeyError, TypeError, ValueError) as error:
            print("a request was not understood: %s" % error, file=STDERR)
            continue
        if reply is not None:
            send(target, reply)
    flush()
    del keep_own_module
    return 0


if __name__ == "__main__":
    sys.exit(main())
