"""What the C kernels take: the structures of native/structures.h, field by field.

Whoever puts one together checks it (NativeLayers, NativeHead, NativeDraft, NativeCheck); a test
compares their sizes with the source's.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_uint32, c_void_p
from typing import ClassVar


class Matrix(ctypes.Structure):
    """A weight [outs, columns] in a format of the source, with its bias or NULL."""

    _fields_: ClassVar = [
        ("format", c_int32),
        ("outs", c_int32),
        ("columns", c_int32),
        ("data", c_void_p),
        ("bias", c_void_p),
    ]


class Layer(ctypes.Structure):
    """Weights of a decoder layer; ``index`` counts the layers of the K,V pages from 0."""

    _fields_: ClassVar = [
        ("attn_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", Matrix),
        ("o", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("index", c_int64),
    ]


class Shape(ctypes.Structure):
    """Sizes that all layers share; ``window`` 0 stands for full attention."""

    _fields_: ClassVar = [
        ("width", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("inner", c_int32),
        ("window", c_int32),
        ("eps", c_float),
    ]


class Batch(ctypes.Structure):
    """Where the rows of a forward pass stand, and the pages they read and write."""

    _fields_: ClassVar = [
        ("rows", c_int32),
        ("block_size", c_int32),
        ("longest", c_int32),
        ("kv_format", c_int32),
        ("pages", c_void_p),
        ("layer_step", c_int64),
        ("kind_step", c_int64),
        ("block_step", c_int64),
        ("places", c_void_p),
        ("positions", c_void_p),
        ("first_blocks", c_void_p),
        ("blocks", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("angles", c_void_p),
        ("coarse", c_void_p),
        ("states", c_void_p),
        ("state_stride", c_int64),
        ("state_rows", c_void_p),
        ("state_slots", c_void_p),
    ]


class DraftHeadWeights(ctypes.Structure):
    """Weights of the draft head; ``vocab`` [outs of the LM head] are token ids."""

    _fields_: ClassVar = [
        ("layer", Layer),
        ("fuse", Matrix),
        ("feedback", Matrix),
        ("embeddings", Matrix),
        ("lm_head", Matrix),
        ("norm", c_void_p),
        ("vocab", c_void_p),
    ]


class DraftCall(ctypes.Structure):
    """Entries to make and sequences to guess for; results and scratch memory behind."""

    _fields_: ClassVar = [
        ("sequences", c_int32),
        ("entries", c_int32),
        ("guesses", c_int32),
        ("bound", c_float),
        ("batch", c_void_p),
        ("spans", c_void_p),
        ("noise", c_void_p),
        ("luck", c_void_p),
        ("tokens", c_void_p),
        ("chances", c_void_p),
        ("made", c_void_p),
        ("first", c_int64),
        ("begun", c_int64),
        ("ids", c_void_p),
        ("hidden", c_void_p),
        ("inputs", c_void_p),
        ("logits", c_void_p),
        ("steps", c_void_p),
        ("numbers", c_void_p),
        ("alive", c_void_p),
        ("ends", c_void_p),
        ("best", c_void_p),
        ("product", c_void_p),
        ("chance", c_void_p),
    ]


class Screen(ctypes.Structure):
    """What makes coarse logits of an LM head, and how far off they may be.

    Without directions ``basis``, ``along`` and ``across`` are None.
    """

    _fields_: ClassVar = [
        ("weight", Matrix),
        ("norms", c_void_p),
        ("basis", c_void_p),
        ("along", c_void_p),
        ("across", c_void_p),
    ]


class HeadWeights(ctypes.Structure):
    """Final norm and LM head."""

    _fields_: ClassVar = [
        ("weight", Matrix),
        ("norm", c_void_p),
        ("eps", c_float),
    ]


class HeadCall(ctypes.Structure):
    """States behind the last layer whose logits are wanted, and the results.

    With the address of a Screen the places of the largest alone, of logits with ``noise`` if there
    is any, and ``logits`` is None.
    """

    _fields_: ClassVar = [
        ("rows", c_int32),
        ("hidden", c_void_p),
        ("places", c_void_p),
        ("screen", c_void_p),
        ("noise", c_void_p),
        ("logits", c_void_p),
        ("best", c_void_p),
        ("multiplied", c_void_p),
    ]


class Noise(ctypes.Structure):
    """Of the logits of a row; of temperature 0 there is none."""

    _fields_: ClassVar = [
        ("temperature", c_float),
        ("seed", c_uint32 * 2),
        ("index", c_uint32),
    ]


class Choice(ctypes.Structure):
    """How the token of a row is drawn, and the token."""

    _fields_: ClassVar = [
        ("noise", Noise),
        ("top_p", c_float),
        ("min_p", c_float),
        ("top_k", c_int32),
        ("row", c_int32),
        ("token", c_int32),
    ]


class Sampling(ctypes.Structure):
    """Choices to make, and the logits they are made from."""

    _fields_: ClassVar = [
        ("count", c_int32),
        ("vocab", c_int32),
        ("logits", c_void_p),
        ("choices", c_void_p),
    ]


class ExitWeights(ctypes.Structure):
    """Weights of an exit; ``layer`` has the adapter's ``gate_up`` and ``down`` alone."""

    _fields_: ClassVar = [
        ("layer", Layer),
        ("router_up", Matrix),
        ("lm_head", Matrix),
        ("router_up_bias", c_void_p),
        ("router_down", c_void_p),
        ("scale", c_void_p),
        ("norm", c_void_p),
        ("router_down_bias", c_float),
        ("floor", c_float),
        ("eps", c_float),
    ]


class ExitCheck(ctypes.Structure):
    """States to check at an exit; results and scratch memory behind."""

    _fields_: ClassVar = [
        ("rows", c_int32),
        ("hidden", c_void_p),
        ("places", c_void_p),
        ("gates", c_void_p),
        ("best", c_void_p),
        ("tops", c_void_p),
        ("seconds", c_void_p),
        ("logits", c_void_p),
        ("fired", c_void_p),
        ("count", c_void_p),
        ("states", c_void_p),
    ]


class Workspace(ctypes.Structure):
    """Scratch memory of a call, and the number of threads that share it."""

    _fields_: ClassVar = [
        ("normed", c_void_p),
        ("wide", c_void_p),
        ("prepared", c_void_p),
        ("phases", c_void_p),
        ("per_thread", c_void_p),
        ("per_thread_floats", c_int64),
        ("partials", c_void_p),
        ("run_starts", c_void_p),
        ("timers", c_void_p),
        ("threads", c_int32),
        ("columns", c_int32),
    ]
