"""Loops in machine code are followed as a warp would run them."""

from __future__ import annotations

from benchmarks.cpu.sass import blocks, loads_in_flight, shortest_loop

# As nvdisasm prints it: a loop with a rare branch, and another way around that does less.
CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 EXIT ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P1 BRA `(.L_x_2) ;
        /*0040*/                   MUFU.EX2 R4, R4 ;
        /*0050*/                   MUFU.EX2 R5, R5 ;
        /*0060*/               @P2 BRA `(.L_x_3) ;
        /*0070*/                   FADD R6, R4, R5 ;
        /*0080*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*0090*/                   MUFU.LG2 R4, R4 ;
        /*00a0*/                   FMUL R4, R4, R5 ;
        /*00b0*/                   FADD R6, R4, R5 ;
.L_x_2:
        /*00c0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00d0*/               @P3 BRA `(.L_x_1) ;
        /*00e0*/                   EXIT ;
"""
STORE = r"STG\.E\.128"


def test_blocks_end_where_control_may_leave_or_come_in():
    found = blocks(CODE)
    assert [(block.opcodes, block.next) for block in found] == [
        (["LDC", "EXIT"], [1]),
        (["LDG.E.128", "BRA"], [2, 5]),
        (["MUFU.EX2", "MUFU.EX2", "BRA"], [3, 4]),
        (["FADD", "BRA"], [5]),
        (["MUFU.LG2", "FMUL", "FADD"], [5]),
        (["STG.E.128", "BRA"], [6, 1]),
        (["EXIT"], []),
    ]


def test_the_shortest_turn_that_does_the_work_is_counted():
    code = blocks(CODE)
    assert shortest_loop(code, STORE, {}) == 4
    assert shortest_loop(code, STORE, {r"MUFU\.EX2": range(2, 3)}) == 9
    assert shortest_loop(code, STORE, {r"MUFU\.EX2": range(2, 3), r"MUFU\.LG2": range(1, 2)}) == 10
    assert shortest_loop(code, STORE, {r"MUFU\.EX2": range(2, 3), "FADD": range(1)}) is None


def test_no_loop_is_found_where_none_is():
    assert shortest_loop(blocks(CODE), "EXIT", {}) is None
    assert shortest_loop(blocks(CODE), "HMMA", {}) is None


def test_loads_in_flight_end_where_one_is_used():
    loads = """
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0030*/               @P0 LDG.E.NA.128.CONSTANT R8, desc[UR4][R2.64] ;
"""
    third = "/*0050*/ LDG.E.128 R12, desc[UR4][R2.64+0x10] ;"
    assert loads_in_flight(loads) == 2 and loads_in_flight(loads + third) == 3
    assert loads_in_flight(loads + "/*0040*/ IMAD.U32 R20, R11.reuse, 0x10000, RZ ;" + third) == 2
    assert loads_in_flight(loads + "/*0040*/ STG.E.128 desc[UR4][R2.64], R4 ;" + third) == 2
    assert loads_in_flight(loads + "/*0040*/ LDG.E.128 R12, desc[UR4][R4.64] ;") == 2
    assert loads_in_flight("/*0010*/ LDG.E R4, desc[UR4][R2.64] ;") == 0
