// The payload's tables and its code at CPL 0. Intel syntax; a template of image.rs, which gives the constants in braces.

    .pushsection .rodata.gmemtest_payload, "a", @progbits
    .balign 4096
    .globl gmemtest_payload
gmemtest_payload:
// GDT: null, kernel code, kernel data, user data, user code, nothing, a TSS for each vCPU.
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff, 0
    .set tss, {area} + {private}
    .rept {vcpus}
    .quad {tss_limit} | ((tss & 0xffffff) << 16) | (0x89 << 40) | ((tss >> 24) << 56), tss >> 32
    .set tss, tss + {area_size}
    .endr
    .org gmemtest_payload + {gdtr}
    .short {gdt_limit}
    .quad {code}
    .org gmemtest_payload + {idtr}
    .short 32 * 16 - 1
    .quad {code} + {idt}
// IDT: the exceptions. CPL 3 may raise #BP with an instruction: that is how it calls.
    .org gmemtest_payload + {idt}
    .set vector, 0
    .rept 32
    .set target, {code} + {stubs} + vector * 16
    .if vector == {call_vector}
    .short target & 0xffff, 8, 0xee00, target >> 16
    .else
    .short target & 0xffff, 8, 0x8e00, target >> 16
    .endif
    .quad 0
    .set vector, vector + 1
    .endr

// Exception stubs: error code (0 where the CPU pushes none) and vector on the stack.
    .set vector, 0
    .rept 32
    .org gmemtest_payload + {stubs} + vector * 16
    .if vector == {call_vector}
    jmp .Lbreakpoint
    .else
    .if (0x60227d00 >> vector) & 1
    .else
    push 0
    .endif
    push vector
    jmp .Lexception
    .endif
    .set vector, vector + 1
    .endr

// The start in protected mode: ESI index, ECX parameter, EBX address width. EBP becomes the vCPU's area.
    .code32
.Lstart32:
    mov ebp, esi
    imul ebp, ebp, {area_size}
    add ebp, {area}
    mov [ebp + {parameter}], ecx
    xor eax, eax
    cmp ecx, {td}
    jne .Lnot_td
    lea ecx, [ebx - 33]
    inc eax
    shl eax, cl
.Lnot_td:
    mov [ebp + {shared_bit} + 4], eax
    mov [ebp + {directory} + {alias_entry} + 4], eax
    mov dword ptr [ebp + {directory} + {alias_entry}], {huge_base} + 0xe7
    mov dword ptr [ebp + {directory} + 511 * 8], {huge_base} + 0xe7
    lea eax, [ebp + {directory} + 7]
    mov [ebp + {pdpt} + 3 * 8], eax
    lea eax, [ebp + {pdpt} + 7]
    mov [ebp + {pml4}], eax
    lea eax, [ebp + {pml4}]
    mov cr3, eax
// PAE.
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov eax, {code} + {gdtr}
    lgdt [eax]
// PG; EFER.LME is set, so this activates long mode.
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    .byte 0xea
    .long {code} + {entry64}
    .short 8
    .code64
    .org gmemtest_payload + {entry64}
    mov ebp, ebp
    mov esi, esi
// TSS: RSP0, I/O bitmap (zero: allowed). The descriptor may be busy from an earlier start of this vCPU.
    lea rax, [rbp + {kernel_stack}]
    mov rsp, rax
    mov [rbp + {private} + 4], rax
    mov word ptr [rbp + {private} + 0x66], {io_bitmap}
    shl esi, 4
    mov eax, {code} + 0x30
    mov byte ptr [rax + rsi + 5], 0x89
    lea eax, [rsi + 0x30]
    ltr ax
    mov eax, {code} + {idtr}
    lidt [rax]
    mov qword ptr [rbp + {window_gpa}], -1
    lea rax, [rip + .Lnext_command]
// To CPL 3 at RAX with empty stacks; RBP is the area.
.Lto_user:
    lea rsp, [rbp + {kernel_stack}]
    lea r14, [rbp + {private}]
    lea r15, [rbp - {to_alias}]
    push 0x1b
    lea rdx, [rbp + {user_stack}]
    push rdx
    push 2
    push 0x23
    push rax
    iretq
// #VE of a TD: an access to a page that was not accepted, or to shared memory that is not there. Accept the page, 4 KiB or
// what it is mapped in, and go back to the access; do the other access by TDVMCALL; report any other #VE like an exception. TDG.VP.VEINFO.GET is needed in both cases: without it the next #VE
// would be a #DF.
.Lvirtualization:
    push rax
    push rcx
    push rdx
    push r8
    push r9
    push r10
    mov eax, 3
    .byte 0x66, 0x0f, 0x01, 0xcc
    test rax, rax
    jnz .Lvirtualization_other
    cmp ecx, 48
    jne .Lvirtualization_other
    mov rcx, rsp
    and rcx, -{area_size}
    test r9, [rcx + {shared_bit}]
    jnz .Lmmio
    mov rcx, r9
    and rcx, -0x1000
.Laccept_again:
    mov r8, rcx
    mov eax, 6
    .byte 0x66, 0x0f, 0x01, 0xcc
    mov rcx, r8
    shr rax, 32
    jz .Lvirtualization_over
// Busy, accepted meanwhile, and of another size.
    cmp eax, 0x80000200
    je .Laccept_again
    cmp eax, 0xb0a
    je .Lvirtualization_over
    cmp eax, 0xc0000b0b
    jne .Lvirtualization_other
    test cl, 1
    jnz .Lvirtualization_other
    and rcx, -{huge}
    or rcx, 1
    jmp .Laccept_again
.Lvirtualization_over:
    pop r10
    pop r9
    pop r8
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq
.Lvirtualization_other:
    pop r10
    pop r9
    pop r8
    pop rdx
    pop rcx
    pop rax
    jmp .Lexception_of_command
// TDVMCALL of MMIO (exit reason 48) for the access at the saved RIP: between RAX and [rdi], as the commands for one value
// do it. EDX becomes its size, with bit 8 for a store, R8D the length of the instruction. Above the eleven registers are
// vector, error code and RIP.
.Lmmio:
    push r11
    push r12
    push r13
    push r14
    push r15
    mov r8, [rsp + 104]
    mov edx, 4
    mov r10d, 2
    movzx eax, byte ptr [r8]
    cmp al, 0x66
    je .Lmmio_2
    cmp al, 0x48
    je .Lmmio_8
    cmp al, 0x0f
    jne .Lmmio_opcode
    mov r10d, 3
    movzx eax, byte ptr [r8 + 1]
    mov edx, 1
    cmp al, 0xb6
    je .Lmmio_load
    mov edx, 2
    cmp al, 0xb7
    je .Lmmio_load
    jmp .Lmmio_other
.Lmmio_2:
    mov edx, 2
    jmp .Lmmio_prefixed
.Lmmio_8:
    mov edx, 8
.Lmmio_prefixed:
    mov r10d, 3
    movzx eax, byte ptr [r8 + 1]
.Lmmio_opcode:
    cmp al, 0x8b
    je .Lmmio_load
    cmp al, 0x89
    je .Lmmio_store
    cmp al, 0x88
    jne .Lmmio_other
    mov edx, 1
.Lmmio_store:
    or edx, 0x100
.Lmmio_load:
    mov r8d, r10d
    movzx r12d, dl
    mov r13d, edx
    shr r13d, 8
    mov r14, r9
    mov r15, [rsp + 80]
    xor eax, eax
    mov ecx, 0xfc00
    xor r10d, r10d
    mov r11d, 48
    .byte 0x66, 0x0f, 0x01, 0xcc
    test r10, r10
    jnz .Lmmio_other
    add [rsp + 104], r8
    test edx, 0x100
    jnz .Lmmio_over
    mov [rsp + 80], r11
.Lmmio_over:
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    jmp .Lvirtualization_over
.Lmmio_other:
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    jmp .Lvirtualization_other
// Exceptions: report them, and go on with the next command.
.Lexception:
    cmp byte ptr [rsp], 20
    je .Lvirtualization
.Lexception_of_command:
    mov rbp, rsp
    and rbp, -{area_size}
    lea r15, [rbp - {to_alias}]
    pop qword ptr [r15 + {m_vector}]
    pop qword ptr [r15 + {m_error}]
    mov rax, [rsp]
    mov [r15 + {m_rip}], rax
    mov rax, cr2
    mov [r15 + {m_cr2}], rax
    mov qword ptr [r15 + {m_status}], {exception}
    lea rax, [rip + .Lreport]
    jmp .Lto_user
// #BP: a call if it comes from the one place that calls. R10 is the service, as in the order below.
.Lbreakpoint:
    lea rax, [rip + .Lcalled]
    cmp rax, [rsp]
    jne .Lother_breakpoint
    cmp r10d, 1
    jb .Lflush_window
    je .Lreport_from_td
    cmp r10d, 3
    jb .Laccept_page
    je .Lmap_gpa_call
    jmp .Lhalt_call
.Lother_breakpoint:
    push 0
    push {call_vector}
    jmp .Lexception

// Service 0: flush the window. CPUID is there for its exit: QEMU's TCG leaves the type of the last exception in
// EXITINTINFO of the next exit, and SVM's KVM takes an MMIO access with that for one during event delivery (it looks at
// the type, not at the valid bit), which it refuses to emulate.
.Lflush_window:
    mov r10, rbx
    xor eax, eax
    cpuid
    mov rbx, r10
    mov eax, {window}
    invlpg [rax]
    add eax, {huge}
    invlpg [rax]
    iretq
// Service 1: report from a TD, TDVMCALL of an OUT instruction (exit reason 30).
.Lreport_from_td:
    push r14
    push r15
    xor eax, eax
    mov ecx, 0xfc00
    xor r10d, r10d
    mov r11d, 30
    mov r12d, 1
    mov r13d, 1
    mov r14d, {port}
    xor r15d, r15d
    .byte 0x66, 0x0f, 0x01, 0xcc
    pop r15
    pop r14
    iretq
// Service 2: TDG.MEM.PAGE.ACCEPT of RCX, address and level; the completion status in RAX.
.Laccept_page:
    mov eax, 6
    .byte 0x66, 0x0f, 0x01, 0xcc
    iretq
// Service 3: map-gpa of RDI, RSI pages, RDX attributes; the result in RAX, in a TD the address of a retry in R11.
.Lmap_gpa_call:
    mov eax, [r14 + {parameter} - {private}]
    cmp eax, {td}
    je .Lmap_gpa_td
    mov rbx, rdi
    mov rcx, rsi
    xor r11d, r11d
    cmp eax, {vmmcall}
    mov eax, {map_gpa_range}
    je .Lmap_gpa_vmmcall
    vmcall
    iretq
.Lmap_gpa_vmmcall:
    vmmcall
    iretq
.Lmap_gpa_td:
    mov r12, rdi
    test edx, {encrypted}
    jnz .Lmap_gpa_private
    or r12, [r14 + {shared_bit} - {private}]
.Lmap_gpa_private:
    mov r13, rsi
    shl r13, 12
    xor eax, eax
    mov ecx, 0x3c00
    xor r10d, r10d
    mov r11d, {tdvmcall_map_gpa}
    .byte 0x66, 0x0f, 0x01, 0xcc
    mov rax, r10
    iretq
// Service 4: halt; in a TD the TDVMCALL of HLT (exit reason 12).
.Lhalt_call:
    cmp dword ptr [r14 + {parameter} - {private}], {td}
    je .Lhalt_td
    hlt
    iretq
.Lhalt_td:
    xor eax, eax
    mov ecx, 0x1c00
    xor r10d, r10d
    mov r11d, 12
    xor r12d, r12d
    .byte 0x66, 0x0f, 0x01, 0xcc
    iretq
