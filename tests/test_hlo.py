"""Counting in the text of XLA programs, on a program written by hand."""

import pytest

from benchmarks import hlo, operations

# A loop of five iterations. Each one gathers two rows of 64 from a split of 1000, convolves, updates one row of a
# result in place, and adds the update up over all devices, inside of a fusion.
PROGRAM = """\
HloModule jit_train_steps, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

FileNames
1 "/home/someone/cifar_flax/training/steps.py"
2 "/home/someone/cifar_flax/models/layers.py"
3 "/lib/python/flax/nnx/linear.py"

FunctionNames
1 "train_step"
2 "conv2d"
3 "Linear.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=82 end_line=82 column=14 end_column=59}
2 {file_name_id=2 function_name_id=2 line=40 end_line=40 column=14 end_column=59}
3 {file_name_id=3 function_name_id=3 line=422 end_line=422 column=14 end_column=59}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%gather_rows (split: u8[1000,64], index: s32[2,1]) -> bf16[2,64] {
  %split = u8[1000,64]{1,0} parameter(0)
  %index = s32[2,1]{1,0} parameter(1)
  %rows = u8[2,64]{1,0} gather(%split, %index), offset_dims={1}, slice_sizes={1,64}
  ROOT %converted = bf16[2,64]{1,0} convert(%rows)
}

%update_row (results: f32[5,64], row: f32[64], at: s32[]) -> f32[5,64] {
  %results = f32[5,64]{1,0} parameter(0)
  %row = f32[64]{0} parameter(1)
  %at = s32[] parameter(2)
  %reduced = f32[64]{0} all-reduce(%row), to_apply=%add
  %as_row = f32[1,64]{1,0} bitcast(%reduced)
  ROOT %updated = f32[5,64]{1,0} dynamic-update-slice(%results, %as_row, %at)
}

%condition (state: (s32[], f32[5,64], u8[1000,64])) -> pred[] {
  %state.1 = (s32[], f32[5,64]{1,0}, u8[1000,64]{1,0}) parameter(0)
  %step.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(5)
  ROOT %before = pred[] compare(%step.1, %limit), direction=LT
}

%body (state: (s32[], f32[5,64], u8[1000,64])) -> (s32[], f32[5,64], u8[1000,64]) {
  %state.2 = (s32[], f32[5,64]{1,0}, u8[1000,64]{1,0}) parameter(0)
  %step.2 = s32[] get-tuple-element(%state.2), index=0
  %results.2 = f32[5,64]{1,0} get-tuple-element(%state.2), index=1
  %split.2 = u8[1000,64]{1,0} get-tuple-element(%state.2), index=2
  %one = s32[] constant(1)
  %index.2 = s32[2,1]{1,0} iota(), iota_dimension=0
  %gathered = bf16[2,64]{1,0} fusion(%split.2, %index.2), kind=kLoop, calls=%gather_rows, metadata={stack_frame_id=1}
  %images = bf16[1,4,4,8]{3,2,1,0} bitcast(%gathered)
  %kernel = bf16[16,3,3,8]{3,2,1,0} constant({...})
  %conv = (bf16[1,4,4,16]{3,2,1,0}, u8[0]{0}) custom-call(%images, %kernel), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", metadata={stack_frame_id=2}
  %activations = bf16[1,4,4,16]{3,2,1,0} get-tuple-element(%conv), index=0
  %row.2 = f32[64]{0} reduce(%activations, %one), dimensions={0}, to_apply=%add, metadata={stack_frame_id=3}, \
backend_config={"reification_cost":[{"exec_time_us":1.5e-02,"name":""}]}
  %updated.2 = f32[5,64]{1,0} fusion(%results.2, %row.2, %step.2), kind=kLoop, calls=%update_row
  %next = s32[] add(%step.2, %one)
  ROOT %state.3 = (s32[], f32[5,64]{1,0}, u8[1000,64]{1,0}) tuple(%next, %updated.2, %split.2)
}

ENTRY %main (argument: f32[5,64], split: u8[1000,64]) -> f32[5,64] {
  %argument = f32[5,64]{1,0} parameter(0)
  %split.4 = u8[1000,64]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %state.4 = (s32[], f32[5,64]{1,0}, u8[1000,64]{1,0}) tuple(%zero, %argument, %split.4)
  %loop = (s32[], f32[5,64]{1,0}, u8[1000,64]{1,0}) while(%state.4), condition=%condition, body=%body
  %result = f32[5,64]{1,0} get-tuple-element(%loop), index=1
  ROOT %copied = f32[5,64]{1,0} copy(%result)
}
"""


@pytest.fixture(scope="module")
def module():
    return hlo.parse(PROGRAM)


@pytest.fixture(scope="module")
def found(module):
    return {operation.instruction.name: operation for operation in operations.operations(module)}


def test_operations_are_those_that_the_device_executes(found):
    assert found.keys() == {"index.2", "gathered", "conv", "row.2", "updated.2", "next", "copied"}
    assert {name for name, operation in found.items() if not operation.is_kernel} == {"next", "copied"}


@pytest.mark.parametrize("known", [True, False])
def test_operations_of_a_loop_count_as_often_as_it_repeats(known):
    """XLA states the number for GPUs only. Otherwise it follows from the condition."""
    count = 'backend_config={"known_trip_count":{"n":"7"}}'
    text = PROGRAM.replace("body=%body", f"body=%body, {count}") if known else PROGRAM
    times = {one.instruction.name: one.times for one in operations.operations(hlo.parse(text))}
    assert times["gathered"] == times["conv"] == (7 if known else 5)
    assert times["copied"] == 1


def test_a_number_of_iterations_that_is_an_argument_is_assumed():
    """It applies to outer loops, and only if the program does not state the number."""
    text = PROGRAM.replace("s32[] constant(5)", "s32[] get-tuple-element(%state.1), index=0")
    times = {one.instruction.name: one.times for one in operations.operations(hlo.parse(text), unknown=9)}
    assert (times["conv"], times["copied"]) == (9, 1)
    times = {one.instruction.name: one.times for one in operations.operations(hlo.parse(PROGRAM), unknown=9)}
    assert times["conv"] == 5


def test_a_slice_reads_its_own_size_and_an_update_in_place_writes_its_own(found):
    assert found["gathered"].bytes == 2 * 64 + 2 * 4 + 2 * 64 * 2  # rows of bytes, indices, rows of bfloat16
    assert found["updated.2"].bytes == 4 * 64 + 4 + 4 * 64  # new row, position, row in the result
    assert found["copied"].bytes == 2 * 4 * 5 * 64


def test_convolutions_of_cudnn(module, found):
    assert found["conv"].bytes == 2 * (4 * 4 * 8 + 16 * 9 * 8 + 4 * 4 * 16)
    assert found["conv"].flops == 2 * 4 * 4 * 16 * 9 * 8
    assert operations.convolution_dtypes(module, found.values()) == {"bf16 x bf16 -> bf16": 5}


def test_all_reduces_inside_of_fusions_count(module, found):
    assert operations.all_reduces(module, found.values()) == 5


def test_slices_of_gathers_and_copies_of_images(module, found):
    assert operations.gathered_slices(module, found.values()) == 2
    assert operations.copied_image_bytes(module, found.values()) == 0
    text = PROGRAM.replace("f32[5,64]{1,0} copy(", "u8[5,64]{1,0} copy(")
    changed = hlo.parse(text.replace("slice_sizes={1,64}", "slice_sizes={1,1}"))
    operated = operations.operations(changed)
    assert operations.gathered_slices(changed, operated) == 2 * 64
    assert operations.copied_image_bytes(changed, operated) == 5 * 64


def test_sources_are_lines_of_the_package(found):
    """Frame 3 is in a library, so its caller in the package counts."""
    assert found["gathered"].source == "training/steps.py:82 train_step"
    assert found["conv"].source == found["row.2"].source == "models/layers.py:40 conv2d"
    assert found["copied"].source == ""


def test_estimates_of_the_compiler(found):
    assert found["row.2"].estimate == 1.5e-2
    assert found["conv"].estimate is None


def test_element_types():
    assert hlo.element_types(PROGRAM) == {"bf16", "f32", "pred", "s32", "u8"}


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("f32[]", [4]),
        ("pred[10]{0}", [10]),
        ("bf16[8,130]{1,0:T(8,128)(2,1)}", [2 * 8 * 256]),
        ("bf16[8,130]{0,1:T(8,128)(2,1)}", [2 * 136 * 128]),  # the first axis is in the 128 lanes
        ("u8[5,32,3]{1,0,2:T(32,128)(4,1)}", [3 * 32 * 128]),
        ("(f32[2]{0}, u8[0]{0}, /*index=2*/s4[4]{0})", [8, 0, 2]),
    ],
)
def test_sizes_include_the_padding_of_tiles(shape, sizes):
    assert [array.bytes for array in hlo.shapes(shape)] == sizes


def test_only_main_memory_counts():
    """S(1) is a TPU's vector memory. A copy between the memories is read or written in the main memory only."""
    text = """
ENTRY %main (x: f32[256,128]) -> f32[256,128] {
  %x = f32[256,128]{1,0:T(8,128)} parameter(0)
  %copy-start = (f32[256,128]{1,0:T(8,128)S(1)}, f32[256,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %inside = f32[256,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %half = f32[128,128]{1,0:T(8,128)S(1)} slice(%inside), slice={[0:128], [0:128]}
  %slice-start = ((f32[256,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]) slice-start(%x), slice={[0:8]}
  %part = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  ROOT %out = f32[256,128]{1,0:T(8,128)} fusion(%inside, %half, %part), kind=kLoop, calls=%missing
}
"""
    found = {one.instruction.name: one for one in operations.operations(hlo.parse(text))}
    whole = 4 * 256 * 128
    assert {name: one.bytes for name, one in found.items()} == {
        "copy-start": whole, "half": 0, "slice-start": 4 * 8 * 128, "out": whole,
    }  # fmt: skip
    assert [name for name, one in found.items() if one.is_asynchronous] == ["copy-start", "slice-start"]
