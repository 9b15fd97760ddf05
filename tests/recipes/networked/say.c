/* Says what it is told to, as a workload that is no friend would: each line "ADDRESS PORT TEXT" of /etc/say is sent as a datagram from
 * port 9999, over and over. A fork is given that file before it is thawed; a template has none. */
#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(void) {
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(9999)};
    int sender = socket(AF_INET, SOCK_DGRAM, 0);
    if (sender < 0 || bind(sender, (struct sockaddr *)&own, sizeof own) != 0) {
        perror("socket");
        return 1;
    }
    puts("waiting");
    fflush(stdout);
    for (;;) {
        FILE *said = fopen("/etc/say", "r");
        char line[2048], address[64];
        while (said && fgets(line, sizeof line, said)) {
            int port, text;
            struct sockaddr_in to = {.sin_family = AF_INET};
            line[strcspn(line, "\n")] = 0;
            if (sscanf(line, "%63s %d %n", address, &port, &text) < 2 || inet_pton(AF_INET, address, &to.sin_addr) != 1)
                continue;
            to.sin_port = htons((uint16_t)port);
            /* Refused as long as there is no network: that is no reason to stop. */
            (void)!sendto(sender, line + text, strlen(line + text), 0, (struct sockaddr *)&to, sizeof to);
        }
        if (said)
            fclose(said);
        usleep(said ? 20000 : 50000);
    }
}
