/* Prints the frequency of this machine's time stamp counter, in kHz. QEMU's emulation passes the counter through. */
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

/* Long enough for an error below 0.01 %: a read takes less than a microsecond. */
#define MEASURED_NS 20000000

static long long now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC_RAW, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int main(void)
{
    /* The median of three: one that is interrupted between its two reads is off. */
    long long khz[3];

    for (int i = 0; i < 3; i++) {
        long long begun = now_ns(), ended;
        unsigned long long first = __rdtsc(), last;

        do {
            ended = now_ns();
            last = __rdtsc();
        } while (ended - begun < MEASURED_NS);
        khz[i] = (long long)(last - first) * 1000000 / (ended - begun);
    }
    long long low = khz[0] < khz[1] ? khz[0] : khz[1], high = khz[0] < khz[1] ? khz[1] : khz[0];
    printf("%lld\n", khz[2] < low ? low : khz[2] > high ? high : khz[2]);
    return 0;
}
