"""Programs read as text: trips of loops, what devices exchange along which axis, what goes to main memory."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkd.core.sharding import make_mesh
from jaxkd.planning import device_groups, hlo

MESH = {"data": 4, "model": 2}
LAYERS, WIDTH, ROWS = 5, 64, 16

# As the TPU compiler writes programs: a gather that overlaps with products stands in the fusions that begin and end it,
# a reduction that keeps a slice is a fusion, a loop's trips follow from its counter, S(1) is memory on the chip.
TPU = """HloModule jit_step, is_scheduled=true

%begin (p: bf16[8,64]) -> (bf16[8,64], bf16[32,64]) {
  %p = bf16[8,64]{1,0} parameter(0)
  %gather.1 = bf16[32,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %begun = (bf16[8,64]{1,0}, bf16[32,64]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%end (p.1: bf16[8,64]) -> bf16[32,64] {
  %p.1 = bf16[8,64]{1,0} parameter(0)
  ROOT %gather.2 = bf16[32,64]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.clone (p.2: f32[32,64]) -> f32[8,64] {
  %p.2 = f32[32,64]{1,0} parameter(0)
  %sum = f32[32,64]{1,0} all-reduce(%p.2), channel_id=9, replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %kept = f32[8,64]{1,0} dynamic-slice(%sum, %zero), dynamic_slice_sizes={8,64}
}

%one_layer (stack: f32[5,8,64], which: s32[]) -> f32[8,64] {
  %stack = f32[5,8,64]{2,1,0} parameter(0)
  %which = s32[] parameter(1)
  %layer = f32[1,8,64]{2,1,0} dynamic-slice(%stack, %which), dynamic_slice_sizes={1,8,64}
  ROOT %flat = f32[8,64]{1,0} bitcast(%layer)
}

%body (carry: (s32[], f32[5,8,64], f32[32,64])) -> (s32[], f32[5,8,64], f32[32,64]) {
  %carry = (s32[], f32[5,8,64]{2,1,0}, f32[32,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %two = s32[] constant(2)
  %on = s32[] add(%i, %two)
  %all = f32[5,8,64]{2,1,0} get-tuple-element(%carry), index=1
  %x = f32[32,64]{1,0} get-tuple-element(%carry), index=2
  %slice = f32[8,64]{1,0} fusion(%all, %i), kind=kLoop, calls=%one_layer
  %narrow = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} convert(%slice)
  %first = (bf16[8,64]{1,0}, bf16[32,64]{1,0:S(1)}) fusion(%narrow), kind=kCustom, calls=%begin
  %last = bf16[32,64]{1,0:S(1)} fusion(%narrow), kind=kCustom, calls=%end
  %part = f32[8,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.clone
  ROOT %next = (s32[], f32[5,8,64]{2,1,0}, f32[32,64]{1,0}) tuple(%on, %all, %x)
}

%condition (carry.1: (s32[], f32[5,8,64], f32[32,64])) -> pred[] {
  %carry.1 = (s32[], f32[5,8,64]{2,1,0}, f32[32,64]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %bound = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (given: (s32[], f32[5,8,64], f32[32,64])) -> f32[] {
  %given = (s32[], f32[5,8,64]{2,1,0}, f32[32,64]{1,0}) parameter(0)
  %three = s32[] constant(3)
  %stack.2 = f32[5,8,64]{2,1,0} get-tuple-element(%given), index=1
  %x.2 = f32[32,64]{1,0} get-tuple-element(%given), index=2
  %start = (s32[], f32[5,8,64]{2,1,0}, f32[32,64]{1,0}) tuple(%three, %stack.2, %x.2)
  %loop = (s32[], f32[5,8,64]{2,1,0}, f32[32,64]{1,0}) while(%start), condition=%condition, body=%body
  %hop.1 = f32[32,64]{1,0} get-tuple-element(%loop), index=2
  %hop = (f32[32,64]{1,0:S(1)}, f32[32,64]{1,0:S(1)}, u32[]{:S(2)}) collective-permute-start(%hop.1), channel_id=3, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %hopped = f32[32,64]{1,0:S(1)} collective-permute-done(%hop)
  ROOT %value = f32[] all-reduce(%scalar), channel_id=1, replica_groups={}, to_apply=%add
}
"""  # noqa: E501


def test_exchanges_of_a_tpu_program():
    """An exchange overlaps with what is computed before its end; a name for what is there is no work."""
    exchanges = hlo.Program(TPU).collectives(MESH)
    assert exchanges == [
        hlo.Collective("reduce-scatter", "data", 32 * 64 * 4, True, 5),
        hlo.Collective("all-gather", "data", 32 * 64 * 2, True, 5, overlapped=True),
        hlo.Collective("collective-permute", "model", 32 * 64 * 4, False, 1),
        hlo.Collective("all-reduce", "data+model", 4, False, 1),
    ]
    end = "  %hopped = f32[32,64]{1,0:S(1)} collective-permute-done(%hop)\n"
    overlapped = lambda text: [c.overlapped for c in hlo.Program(text).collectives(MESH) if c.axis == "model"]
    fused = "  %busy = f32[32,64]{1,0} fusion(%hop.1), kind=kLoop, calls=%one_layer\n"
    named = "  %named = f32[2048]{0} bitcast(%hop.1)\n"
    assert end in TPU
    assert overlapped(TPU) == overlapped(TPU.replace(end, named + end)) == [False]
    assert overlapped(TPU.replace(end, fused + end)) == [True]
    assert overlapped(TPU.replace(end, end + fused)) == [False]


def test_memory_traffic_of_a_tpu_program():
    """Of the stack one layer a trip; nothing of what is on the chip; a fusion's operands and results once."""
    layer, whole = 8 * 64 * 4, 32 * 64 * 4
    slice_, convert, scatter, count = 2 * layer + 4, layer, whole + layer, 3 * 4 + 2 * 4 + 1
    once = whole + 4  # the hop reads its operand, the sum writes a number
    assert hlo.Program(TPU).traffic() == 5 * (slice_ + convert + scatter + count) + once
    # A gather that is handed on from its first fusion to its last is read once and written once.
    shard, gathered = "bf16[8,64]{1,0:T(8,128)(2,1)S(1)}", "bf16[32,64]{1,0:S(1)} fusion"
    outside = TPU.replace(shard, shard.replace("S(1)", "")).replace(gathered, gathered.replace(":S(1)", ""))
    more = 2 * 8 * 64 * 2 + 32 * 64 * 2  # that the shard is written too
    assert hlo.Program(outside).traffic() == hlo.Program(TPU).traffic() + 5 * more


def test_a_slice_inside_a_nested_fusion_is_what_is_read():
    """A product with one layer of a stack of four, which an inner fusion takes out of it."""
    text = """HloModule one

%inner (stack: f32[4,8,64], which: s32[]) -> f32[8,64] {
  %stack = f32[4,8,64]{2,1,0} parameter(0)
  %which = s32[] parameter(1)
  %zero = s32[] constant(0)
  %layer = f32[1,8,64]{2,1,0} dynamic-slice(%stack, %which, %zero, %zero), dynamic_slice_sizes={1,8,64}
  ROOT %flat = f32[8,64]{1,0} bitcast(%layer)
}

%outer (x: f32[2,8], stack: f32[4,8,64], which: s32[]) -> f32[2,64] {
  %x = f32[2,8]{1,0} parameter(0)
  %stack = f32[4,8,64]{2,1,0} parameter(1)
  %which = s32[] parameter(2)
  %matrix = f32[8,64]{1,0} fusion(%stack, %which), kind=kLoop, calls=%inner
  ROOT %product = f32[2,64]{1,0} convolution(%x, %matrix), dim_labels=bf_io->bf
}

ENTRY %main (x: f32[2,8], stack: f32[4,8,64], which: s32[]) -> f32[2,64] {
  %x = f32[2,8]{1,0} parameter(0)
  %stack = f32[4,8,64]{2,1,0} parameter(1)
  %which = s32[] parameter(2)
  ROOT %out = f32[2,64]{1,0} fusion(%x, %stack, %which), kind=kOutput, calls=%outer
}
"""
    assert hlo.Program(text).traffic() == 4 * (2 * 8 + 8 * 64 + 1 + 2 * 64)
    slice_ = "dynamic-slice(%stack, %which, %zero, %zero), dynamic_slice_sizes={1,8,64}"
    all_of_it = text.replace(slice_, "bitcast(%stack)").replace("4,8,64", "1,8,64")
    assert hlo.Program(all_of_it).traffic() == 4 * (2 * 8 + 8 * 64 + 2 * 64)


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_in_place_is_the_update(fused):
    update = "dynamic-update-slice(%p, %u, %i, %i)"
    arrays = """%p = f32[100,64]{1,0} parameter(0)
  %u = f32[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %new = f32[100,64]{1,0} """
    inner = f"%write (p: f32[100,64], u: f32[1,64], i: s32[]) -> f32[100,64] {{\n  {arrays}{update}\n}}\n\n"
    outer = "fusion(%p, %u, %i), kind=kLoop, calls=%write" if fused else update
    text = f"{inner}ENTRY %main (p: f32[100,64], u: f32[1,64], i: s32[]) -> f32[100,64] {{\n  {arrays}{outer}\n}}\n"
    assert hlo.Program(text).traffic() == 2 * 64 * 4 + (4 if fused else 8)  # and the places, for each axis


@pytest.mark.parametrize(
    ("attributes", "axis"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", "data"),
        ("replica_groups=[4,2]<=[8], dimensions={1}", "model"),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", "data"),
        ("replica_groups=[1,8]<=[8]", "data+model"),
        ("replica_groups={}", "data+model"),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", ""),
        ("replica_groups=mesh['x'=4,'y'=2] {'y'}, to_apply=%add", "model"),
        ("replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}", "data"),
        ("replica_groups=mesh['x'=8] {'x':(4)2}", "model"),
        ("source_target_pairs={{0,2},{2,0}}", "data"),
    ],
)
def test_groups_of_devices_lie_along_an_axis(attributes, axis):
    assert device_groups.axis_of(device_groups.groups(attributes, 8), MESH) == axis


@pytest.fixture(scope="module")
def compiled():
    """A stack of layers in a scan, its weights spread over both axes, compiled for eight fake devices."""
    mesh = make_mesh(**MESH)
    spread = lambda shape, *axes: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))

    def run(x, stack):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P(None, "model")))
            y = jnp.tanh(x @ w)
            return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P("data", None))), None

        return jnp.sum(jax.lax.scan(layer, x, stack)[0])

    x, stack = spread((ROWS, WIDTH), "data", None), spread((LAYERS, WIDTH, WIDTH), None, "data", "model")
    return jax.jit(run).lower(x, stack).compile()


def test_exchanges_and_traffic_of_a_compiled_program_grow_with_the_trips(compiled):
    exchanges = {(c.op, c.axis, c.in_loop): c for c in hlo.Program(compiled.as_text()).collectives(MESH)}
    weights = exchanges["all-gather", "data", True]
    assert (weights.bytes, weights.count) == (WIDTH * WIDTH // 2 * 4, LAYERS)
    rows = exchanges["all-gather", "model", True]
    assert (rows.bytes, rows.count) == (ROWS // 4 * WIDTH * 4, LAYERS)
    assert not exchanges["all-reduce", "data", False].in_loop
    gathered = WIDTH * WIDTH // 2 * 4
    assert hlo.Program(compiled.as_text()).traffic() > LAYERS * 2 * gathered


# Between slices the TPU compiler sends through the hosts: ids of devices are 100,000 times the slice, from 1, and the
# place there.
SLICES = """HloModule jit_step, is_scheduled=true

%body (x: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %x = (s32[], f32[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %g = f32[8,128]{1,0} get-tuple-element(%x), index=1
  %token = token[] after-all()
  %send.1 = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%g, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.1 = token[] send-done(%send.1), channel_id=2, is_host_transfer=true
  %recv-done.1 = (f32[8,128]{1,0}, token[]) recv-done(%recv.1), channel_id=1, is_host_transfer=true
  %sum = f32[8,128]{1,0} get-tuple-element(%recv-done.1), index=0
  ROOT %t = (s32[], f32[8,128]) tuple(%next, %sum)
}

%condition (x.1: (s32[], f32[8,128])) -> pred[] {
  %x.1 = (s32[], f32[8,128]) parameter(0)
  %i.1 = s32[] get-tuple-element(%x.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %three), direction=LT
}

ENTRY %main (p: f32[8,128], q: f32[4,16]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %q = f32[4,16]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,128]) tuple(%zero, %p)
  %loop = (s32[], f32[8,128]) while(%start), condition=%condition, body=%body
  %token.1 = token[] after-all()
  %send.2 = (f32[4,16]{1,0}, u32[], token[]) send(%q, %token.1), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-gather.2_0",_xla_megascale_target={{100000,100001,200000,200001},{100002,100003,200002,200003}},_xla_megascale_transfer_type="ALL_GATHER"}
  %recv.2 = (f32[16,16]{1,0}, u32[], token[]) recv(%token.1), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-gather.2_0",_xla_megascale_target={{100000,100001,200000,200001},{100002,100003,200002,200003}},_xla_megascale_transfer_type="ALL_GATHER"}
  %send.3 = (f32[4,16]{1,0}, u32[], token[]) send(%q, %token.1), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="permute.3_0",_xla_megascale_target={{100001->200001},{200001->100001}},_xla_megascale_transfer_type="ONE_TO_ONE"}
  ROOT %out = f32[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_what_goes_between_slices_is_read_from_what_is_sent():
    mesh = {"replica": 2, "data": 2, "model": 2}
    ids = lambda order: [100_000 * (s + 1) + i for s in (0, 1) for i in order]
    # The mesh does not have a slice's devices in their order: the second and the fourth are exchanged.
    assert hlo.Program(SLICES).collectives(mesh, ids([0, 3, 2, 1])) == [
        hlo.Collective("all-reduce", "replica", 8 * 128 * 4, True, 3),
        hlo.Collective("all-gather", "replica+data+model", 16 * 16 * 4, False, 1),
        hlo.Collective("collective-permute", "replica", 4 * 16 * 4, False, 1),
    ]
    in_order = hlo.Program(SLICES).collectives(mesh, ids([0, 1, 2, 3]))
    assert in_order[1].axis == "replica+model"
    # Work between a transfer's two ends hides it, and only that transfer.
    end = "  %recv-done.1 ="
    busy = "  %busy = f32[8,128]{1,0} convolution(%g, %g), dim_labels=bf_io->bf\n"
    exchanges = hlo.Program(SLICES.replace(end, busy + end, 1)).collectives(mesh, ids([0, 3, 2, 1]))
    assert [c.overlapped for c in exchanges] == [True, False, False]
