/* Owners of mailboxes, honest and not.
 *
 *     plant socket NAME TOKEN MODE     asks the agent; writes what comes to /tmp/plant-NAME. MODE is what it answers:
 *                                      ack, silent, fail, forge (an ack without the key), relay (the payload's "line")
 *     plant self NAME TOKEN            plants by itself and does not tell the agent
 *     plant twice NAME TOKEN           the same, two mailboxes of one name
 *
 * `-` is no token. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static uint32_t crc_more(uint32_t crc, const uint8_t *bytes, size_t len) {
    while (len--) {
        crc ^= *bytes++;
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return crc;
}

/* Offsets are those of docs/mailbox.md. */
static void plant(const char *name, const char *token) {
    uint8_t *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (page == MAP_FAILED || mlock(page, 4096)) exit(1);
    uint32_t count = 1, capacity = 3776, armed = 1;
    page[16] = 1;
    if (getrandom(page + 24, 16, 0) != 16) exit(1);
    memcpy(page + 44, &count, 4);
    memcpy(page + 48, &capacity, 4);
    page[52] = (uint8_t)strlen(name);
    page[53] = (uint8_t)strlen(token);
    memcpy(page + 56, name, strlen(name));
    memcpy(page + 120, token, strlen(token));
    memcpy(page, "OFFSHOOT-MAILBOX", 16);
    uint32_t crc = ~crc_more(crc_more(~0u, page, 20), page + 24, 224);
    memcpy(page + 248, &crc, 4);
    memcpy(page + 20, &armed, 4);
}

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    const char *how = argv[1], *name = argv[2], *token = strcmp(argv[3], "-") ? argv[3] : "";
    if (strcmp(how, "socket")) {
        plant(name, token);
        if (!strcmp(how, "twice")) plant(name, token);
        puts("planted");
        fflush(stdout);
        for (;;) pause();
    }
    const char *mode = argc > 4 ? argv[4] : "ack";
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "/run/offshoot/agent.sock"};
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) { perror("agent.sock"); return 1; }
    FILE *in = fdopen(fd, "r");
    dprintf(fd, "{\"op\":\"plant\",\"name\":\"%s\",\"capacity\":4096", name);
    if (*token) dprintf(fd, ",\"token\":\"%s\"", token);
    dprintf(fd, "}\n");
    static char line[1 << 17];
    while (fgets(line, sizeof line, in)) {
        if (strstr(line, "\"ok\":true")) {
            puts("planted");
            fflush(stdout);
        }
        if (!strstr(line, "\"event\":\"filled\"")) continue;
        char path[128], id[64] = "";
        snprintf(path, sizeof path, "/tmp/plant-%s", name);
        FILE *out = fopen(path, "w");
        fputs(line, out);
        fclose(out);
        FILE *file = fopen("/run/offshoot/id", "r");
        if (!file || !fgets(id, sizeof id, file)) return 1;
        fclose(file);
        if (!strcmp(mode, "ack")) dprintf(fd, "{\"op\":\"ack\"}\n");
        if (!strcmp(mode, "fail")) dprintf(fd, "{\"op\":\"fail\",\"reason\":\"no room\"}\n");
        char *from = strstr(line, "\"line\":\""), *to = from ? strchr(from + 8, '"') : NULL;
        if (!strcmp(mode, "relay") && to) dprintf(fd, "{\"op\":\"relay\",\"line\":\"%.*s\"}\n", (int)(to - from - 8), from + 8);
        if (!strcmp(mode, "forge"))
            dprintf(fd, "{\"op\":\"relay\",\"line\":\"offshoot-ack v=1 stage=applied mailbox=%s fork=%s hmac=%064d\"}\n", name, id, 0);
    }
    return 1;
}
