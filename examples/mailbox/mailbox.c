/* A program that plants a mailbox by itself, in its own memory, and answers for it. No library is needed:
 *
 *     gcc -O2 -static -o mailbox mailbox.c && ./mailbox [NAME]
 *
 * It announces the mailbox to the agent, waits until a fork brings a payload, writes it to /tmp/mailbox-NAME.json and
 * sends an ack signed with the key in its page. The page is described in the module documentation of the identity crate
 * (crates/identity/src/mailbox.rs); docs/mailbox.md has a summary. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, STATE = 20, NONCE = 24, INDEX = 40, COUNT = 44, CAPACITY = 48, NAME_LEN = 52, TOKEN_LEN = 53,
       NAME = 56, TOKEN = 120, HEADER_CRC = 248, LENGTH = 252, PAYLOAD_CRC = 256, KEY = 260, PAYLOAD = 320 };
enum { ARMED = 1, FILLED = 2, TAKEN = 3 };

static void fail(const char *what) { perror(what); exit(1); }

/* --- CRC-32 (IEEE) --- */
static uint32_t crc32_more(uint32_t crc, const uint8_t *bytes, size_t len) {
    while (len--) {
        crc ^= *bytes++;
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return crc;
}

/* --- SHA-256 and HMAC --- */
typedef struct { uint32_t h[8]; uint8_t block[64]; uint64_t len; } Sha;
/* The constants are the first 32 bits of the fractional parts of the cube roots (and square roots) of primes. */
static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
#define ROR(x, n) ((x) >> (n) | (x) << (32 - (n)))
static void sha_block(Sha *s) {
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; i++) w[i] = (uint32_t)s->block[4 * i] << 24 | s->block[4 * i + 1] << 16 | s->block[4 * i + 2] << 8 | s->block[4 * i + 3];
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + (ROR(w[i - 15], 7) ^ ROR(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] + (ROR(w[i - 2], 17) ^ ROR(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(v, s->h, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t a = v[7] + (ROR(v[4], 6) ^ ROR(v[4], 11) ^ ROR(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) + K[i] + w[i];
        uint32_t b = (ROR(v[0], 2) ^ ROR(v[0], 13) ^ ROR(v[0], 22)) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += a;
        v[0] = a + b;
    }
    for (int i = 0; i < 8; i++) s->h[i] += v[i];
}
static void sha_init(Sha *s) {
    static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(s->h, start, sizeof start);
    s->len = 0;
}
static void sha_add(Sha *s, const void *bytes, size_t len) {
    for (const uint8_t *b = bytes; len--; b++) {
        s->block[s->len++ % 64] = *b;
        if (s->len % 64 == 0) sha_block(s);
    }
}
static void sha_end(Sha *s, uint8_t out[32]) {
    uint64_t bits = s->len * 8;
    uint8_t end[8];
    sha_add(s, "\x80", 1);
    while (s->len % 64 != 56) sha_add(s, "", 1);
    for (int i = 0; i < 8; i++) end[i] = (uint8_t)(bits >> (56 - 8 * i));
    sha_add(s, end, 8);
    for (int i = 0; i < 32; i++) out[i] = (uint8_t)(s->h[i / 4] >> (24 - 8 * (i % 4)));
}
static void hmac(const uint8_t key[32], const char *text, uint8_t out[32]) {
    uint8_t inner[64] = {0}, outer[64] = {0};
    Sha s;
    memcpy(inner, key, 32);
    memcpy(outer, key, 32);
    for (int i = 0; i < 64; i++) { inner[i] ^= 0x36; outer[i] ^= 0x5c; }
    sha_init(&s); sha_add(&s, inner, 64); sha_add(&s, text, strlen(text)); sha_end(&s, out);
    sha_init(&s); sha_add(&s, outer, 64); sha_add(&s, out, 32); sha_end(&s, out);
}

static void put32(uint8_t *at, uint32_t value) { memcpy(at, &value, 4); } /* x86-64 is little endian */
static uint32_t get32(const uint8_t *at) { uint32_t value; memcpy(&value, at, 4); return value; }

/* Plants one page. It is written where it stays: a copy elsewhere that is page-aligned would be found too. */
static uint8_t *plant(const char *name) {
    uint8_t *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (page == MAP_FAILED) fail("mmap");
    if (mlock(page, PAGE) || madvise(page, PAGE, MADV_DONTFORK)) fail("mlock");
    page[16] = 1; /* version */
    if (getrandom(page + NONCE, 16, 0) != 16) fail("getrandom");
    put32(page + INDEX, 0);
    put32(page + COUNT, 1);
    put32(page + CAPACITY, PAGE - PAYLOAD);
    page[NAME_LEN] = (uint8_t)strlen(name);
    memcpy(page + NAME, name, strlen(name));
    memcpy(page, "OFFSHOOT-MAILBOX", 16);
    put32(page + HEADER_CRC, ~crc32_more(crc32_more(~0u, page, STATE), page + NONCE, HEADER_CRC - NONCE));
    __atomic_store_n((uint32_t *)(page + STATE), ARMED, __ATOMIC_RELEASE);
    return page;
}

/* One request to the agent, and its answer. */
static void ask(FILE *agent, const char *request, char *answer, size_t size) {
    fprintf(agent, "%s\n", request);
    fflush(agent);
    if (!fgets(answer, (int)size, agent)) fail("the agent's answer");
    if (!strstr(answer, "\"ok\":true")) { fprintf(stderr, "refused: %s", answer); exit(1); }
}

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "app:c";
    if (strlen(name) > 64) { fprintf(stderr, "a mailbox name has at most 64 bytes\n"); return 1; }
    uint8_t *page = plant(name);

    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "/run/offshoot/agent.sock"};
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address)) fail("/run/offshoot/agent.sock");
    FILE *agent = fdopen(fd, "r+");
    if (!agent) fail("fdopen");
    char line[8192], answer[1024], hex[65];
    for (int i = 0; i < 16; i++) sprintf(hex + 2 * i, "%02x", page[NONCE + i]);
    snprintf(line, sizeof line, "{\"op\":\"announce\",\"name\":\"%s\",\"capacity\":%d,\"nonce\":\"%s\"}", name, PAGE - PAYLOAD, hex);
    ask(agent, line, answer, sizeof answer);

    /* The program is frozen while its template is captured, and a fork's page is filled before the fork runs. So it may
     * look as seldom as it likes: the payload is there at the first look in the fork. */
    while (__atomic_load_n((uint32_t *)(page + STATE), __ATOMIC_ACQUIRE) != FILLED) {
        struct timespec pause = {.tv_nsec = 20 * 1000 * 1000};
        nanosleep(&pause, NULL);
    }
    uint8_t payload[PAGE - PAYLOAD], key[32], tag[32];
    uint32_t len = get32(page + LENGTH);
    int torn = len > sizeof payload || ~crc32_more(~0u, page + PAYLOAD, len) != get32(page + PAYLOAD_CRC);
    memcpy(key, page + KEY, 32);
    if (!torn) memcpy(payload, page + PAYLOAD, len);
    explicit_bzero(page + LENGTH, PAGE - LENGTH);
    __atomic_store_n((uint32_t *)(page + STATE), TAKEN, __ATOMIC_RELEASE);
    if (torn) { fprintf(stderr, "the mailbox was written in part\n"); return 1; }

    char path[128];
    snprintf(path, sizeof path, "/tmp/mailbox-%s.json", name);
    FILE *out = fopen(path, "w");
    if (!out || fwrite(payload, 1, len, out) != len || fclose(out)) fail(path);

    char id[64] = "";
    FILE *file = fopen("/run/offshoot/id", "r");
    if (!file || !fgets(id, sizeof id, file)) fail("/run/offshoot/id");
    snprintf(line, sizeof line, "offshoot-ack v=1 stage=applied mailbox=%s fork=%s", name, id);
    hmac(key, line, tag);
    explicit_bzero(key, sizeof key);
    for (int i = 0; i < 32; i++) sprintf(hex + 2 * i, "%02x", tag[i]);
    char request[8400];
    snprintf(request, sizeof request, "{\"op\":\"relay\",\"line\":\"%s hmac=%s\"}", line, hex);
    ask(agent, request, answer, sizeof answer);
    return 0;
}
