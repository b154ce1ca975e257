# Every aclnn...GetWorkspaceSize loads the address of its name into r11 and jumps here (System V calling convention):
# six integer registers and eight vector registers are stored, and the rest of the arguments lies on the caller's stack.
    .text
    .globl  standin_trampoline
    .hidden standin_trampoline
    .type   standin_trampoline, @function
standin_trampoline:
    pushq   %rbp
    movq    %rsp, %rbp
    subq    $112, %rsp
    movq    %rdi, -48(%rbp)
    movq    %rsi, -40(%rbp)
    movq    %rdx, -32(%rbp)
    movq    %rcx, -24(%rbp)
    movq    %r8,  -16(%rbp)
    movq    %r9,  -8(%rbp)
    movsd   %xmm0, -112(%rbp)
    movsd   %xmm1, -104(%rbp)
    movsd   %xmm2, -96(%rbp)
    movsd   %xmm3, -88(%rbp)
    movsd   %xmm4, -80(%rbp)
    movsd   %xmm5, -72(%rbp)
    movsd   %xmm6, -64(%rbp)
    movsd   %xmm7, -56(%rbp)
    movq    %r11, %rdi
    leaq    -48(%rbp), %rsi
    leaq    -112(%rbp), %rdx
    leaq    16(%rbp), %rcx
    call    standin_enter@PLT
    leave
    ret
    .size   standin_trampoline, .-standin_trampoline
    .section .note.GNU-stack,"",@progbits
