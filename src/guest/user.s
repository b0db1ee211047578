// The payload's code at CPL 3: the commands, and the reset vector behind them. Intel syntax; a template of image.rs.
//
// Registers: R15 the mailbox, R14 the vCPU's private page; R12 and R13 what is left of a range.

// From here on at CPL 3. Done, with RAX as the result.
.Ldone:
    mov [r15 + {m_result}], rax
    mov qword ptr [r15 + {m_status}], {done}
.Lreport:
    cmp dword ptr [r14 + {parameter} - {private}], {td}
    je .Lreport_td
    out {port}, al
    jmp .Lnext_command
.Lreport_td:
    mov r10d, 1
    call .Lcall
// Next command.
.Lnext_command:
    mov eax, [r15 + {m_command}]
    cmp eax, {commands}
    jae .Lunknown_command
    lea rbx, [rip + .Lcommands]
    movsxd rax, dword ptr [rbx + rax * 4]
    add rax, rbx
    jmp rax
.Lunknown_command:
    mov qword ptr [r15 + {m_status}], {bad_command}
    jmp .Lreport
    .balign 4
.Lcommands:
    .long .Lread - .Lcommands, .Lwrite - .Lcommands, .Lfill - .Lcommands, .Lcheck - .Lcommands, .Ltouch - .Lcommands, .Lexecute - .Lcommands
    .long .Lread_while - .Lcommands, .Lwrite_until_stopped - .Lcommands, .Laccept - .Lcommands, .Lmap_gpa - .Lcommands, .Lhalt - .Lcommands
// Window: RDI becomes the virtual address of the guest-physical address in RDI. Changes RAX.
.Lmap_window:
    mov rax, rdi
    and rax, -{huge}
    cmp rax, [r14 + {window_gpa} - {private}]
    je .Lwindow_ready
    mov [r14 + {window_gpa} - {private}], rax
    or rax, 0xe7
    mov [r14 + {directory} - {private}], rax
    add rax, {huge}
    mov [r14 + {directory} - {private} + 8], rax
    xor r10d, r10d
    call .Lcall
.Lwindow_ready:
    and edi, {huge} - 1
    mov eax, {window}
    add rdi, rax
    ret
// Calls service R10 of the code at CPL 0.
.Lcall:
    int3
.Lcalled:
    ret
// The next piece of the range at R12, of R13 bytes: RDI its virtual address, RCX its length. Changes RAX and RDX.
.Lnext_piece:
    mov rdi, r12
    call .Lmap_window
    mov edx, edi
    and edx, {huge} - 1
    mov ecx, {huge}
    sub ecx, edx
    cmp r13, rcx
    cmovb rcx, r13
    add r12, rcx
    sub r13, rcx
    ret
// Read.
.Lread:
    mov rdi, [r15 + {m_gpa}]
    call .Lmap_window
    mov ecx, [r15 + {m_len}]
    cmp ecx, 2
    jb .Lread1
    je .Lread2
    cmp ecx, 4
    je .Lread4
    mov rax, [rdi]
    jmp .Ldone
.Lread1:
    movzx eax, byte ptr [rdi]
    jmp .Ldone
.Lread2:
    movzx eax, word ptr [rdi]
    jmp .Ldone
.Lread4:
    mov eax, [rdi]
    jmp .Ldone
// Write.
.Lwrite:
    mov rdi, [r15 + {m_gpa}]
    call .Lmap_window
    mov ecx, [r15 + {m_len}]
    mov rax, [r15 + {m_value}]
    cmp ecx, 2
    jb .Lwrite1
    je .Lwrite2
    cmp ecx, 4
    je .Lwrite4
    mov [rdi], rax
    jmp .Ldone_zero
.Lwrite1:
    mov [rdi], al
    jmp .Ldone_zero
.Lwrite2:
    mov [rdi], ax
    jmp .Ldone_zero
.Lwrite4:
    mov [rdi], eax
.Ldone_zero:
    xor eax, eax
    jmp .Ldone
// Fill.
.Lfill:
    mov r12, [r15 + {m_gpa}]
    mov r13, [r15 + {m_len}]
.Lfill_piece:
    test r13, r13
    jz .Ldone_zero
    call .Lnext_piece
    mov al, [r15 + {m_value}]
    rep stosb
    jmp .Lfill_piece
// Check: eight bytes at a time, then the bytes of the eight that differ, or the rest.
.Lcheck:
    mov r12, [r15 + {m_gpa}]
    mov r13, [r15 + {m_len}]
.Lcheck_piece:
    test r13, r13
    jz .Ldone_zero
    call .Lnext_piece
    mov edx, ecx
    and edx, 7
    mov rax, [r15 + {m_value}]
    shr rcx, 3
    cmp eax, eax
    repe scasq
    je .Lcheck_bytes
    sub rdi, 8
    mov edx, 8
.Lcheck_bytes:
    mov ecx, edx
    cmp eax, eax
    repe scasb
    je .Lcheck_piece
    dec rdi
    movzx eax, byte ptr [rdi]
    mov [r15 + {m_result2}], rax
    and edi, {huge} - 1
    add rdi, [r14 + {window_gpa} - {private}]
    mov [r15 + {m_result}], rdi
    mov qword ptr [r15 + {m_status}], {mismatch}
    jmp .Lreport
// Touch.
.Ltouch:
    mov r12, [r15 + {m_gpa}]
    mov r13, [r15 + {m_len}]
    xor ebx, ebx
.Ltouch_piece:
    test r13, r13
    jz .Ltouch_done
    call .Lnext_piece
.Ltouch_page:
    mov rax, [rdi]
    inc rbx
    add rdi, 4096
    sub rcx, 4096
    ja .Ltouch_page
    jmp .Ltouch_piece
.Ltouch_done:
    mov rax, rbx
    jmp .Ldone
// Execute.
.Lexecute:
    mov rdi, [r15 + {m_gpa}]
    call .Lmap_window
    push r14
    push r15
    call rdi
    pop r15
    pop r14
    jmp .Ldone
// Read while.
.Lread_while:
    mov rdi, [r15 + {m_gpa}]
    call .Lmap_window
    mov rdx, [r15 + {m_value}]
.Lread_again:
    mov rax, [rdi]
    inc qword ptr [r15 + {m_iterations}]
    cmp rax, rdx
    jne .Ldone
    cmp qword ptr [r15 + {m_stop}], 0
    je .Lread_again
    jmp .Ldone
// Write until stopped.
.Lwrite_until_stopped:
    mov rdi, [r15 + {m_gpa}]
    call .Lmap_window
    xor eax, eax
.Lwrite_again:
    inc rax
    mov [rdi], rax
    mov [r15 + {m_iterations}], rax
    cmp qword ptr [r15 + {m_stop}], 0
    je .Lwrite_again
    jmp .Ldone
// Accept, one page after the other; the level in the value, the page size 4 KiB or 2 MiB by it.
.Laccept:
    mov r12, [r15 + {m_gpa}]
    mov r13, [r15 + {m_len}]
    mov rcx, [r15 + {m_value}]
    mov ebx, 4096
    test ecx, ecx
    jz .Laccept_next
    shl ebx, 9
.Laccept_next:
    mov rcx, r12
    or rcx, [r15 + {m_value}]
    mov r10d, 2
    call .Lcall
    test rax, rax
    jnz .Ldone
    add r12, rbx
    sub r13, rbx
    ja .Laccept_next
    xor eax, eax
    jmp .Ldone
// Map-gpa.
.Lmap_gpa:
    mov rdi, [r15 + {m_gpa}]
    mov rsi, [r15 + {m_len}]
    mov rdx, [r15 + {m_value}]
    mov r10d, 3
    call .Lcall
    mov [r15 + {m_result2}], r11
    jmp .Ldone
// Halt.
.Lhalt:
    mov r10d, 4
    call .Lcall
    xor eax, eax
    jmp .Ldone
    .org gmemtest_payload + {reset}
    .code32
    jmp .Lstart32
    .code64
    .org gmemtest_payload + {reset} + 16
    .popsection
